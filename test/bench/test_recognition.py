"""Frozen batch norms of torchvision, timm and transformers: each class there is, recognised."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bench.libraries import MissingLibrary
from bench.recognition import MODELS, frozen_batch_norms, recognise

LEAST = {"torchvision": 1, "timm": 1, "transformers": 10}  # so that the search itself is tested


@pytest.mark.parametrize("library", LEAST)
def test_every_class(library):
    try:
        classes = frozen_batch_norms(library)
    except MissingLibrary as error:
        pytest.skip(str(error))
    assert len(classes) >= LEAST[library]
    # All in one network, which is compiled once.
    layers = []
    for make in classes.values():
        layers += [nn.Conv2d(4, 4, 1), make(4), nn.Tanh()]
    found = recognise(nn.Sequential(*layers).eval(), torch.randn(1, 4, 5, 5))
    assert found.batch_norms == found.after_layer == found.folded == len(classes)
    assert set(found.classes) == {name.rpartition(".")[2] for name in classes}


# The norms' calls after a layer. All networks: ``python -m bench recognition``.
NETWORKS = {"timm resnet18": 20, "transformers levit": 38}


@pytest.mark.parametrize("name", NETWORKS)
def test_none_missed(name):
    try:
        model = MODELS[name]().eval()
    except MissingLibrary as error:
        pytest.skip(str(error))
    found = recognise(model, torch.randn(1, 3, *[224 if "levit" in name else 64] * 2))
    assert not found.missed
    assert found.after_layer == NETWORKS[name]


class Missed(nn.Module):
    """One batch norm after another function of the layer's output; one folded; one missed."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 4, 1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        before = self.norms[0](self.convs[0](x).relu())
        shared = self.convs[2](x)
        return before + self.norms[1](self.convs[1](x)) + self.norms[2](shared) * shared


def test_misses_are_counted():
    found = recognise(Missed().eval(), torch.randn(1, 3, 4, 4))
    counts = (found.batch_norms, found.after_layer, found.folded)
    assert (*counts, found.missed) == (3, 2, 1, ("convs.2",))
