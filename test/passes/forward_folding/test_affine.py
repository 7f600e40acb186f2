"""Affine maps after layers: which are recognized, in every spelling, and folded right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from common import spread_statistics
from passes.forward_folding.folding import Frozen, assert_folded_right, codes, folded
from torch import nn

import convbn_inductor_pass as cbn
from convbn_inductor_pass import testing
from convbn_inductor_pass._torch import inductor

FORMS = (
    "functional", "torchvision", "written", "reversed", "addcmul", "expanded", "constants",
    "several",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_spellings(form, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Frozen(8, form), nn.ReLU()).to(dtype)
    x = torch.randn(2, 3, 6, 6, dtype=dtype)
    (record,) = assert_folded_right(model, x, count=1)
    has_epilogues = dtype != torch.float64 and inductor.has_onednn_epilogues(dtype)
    assert record.epilogue == ("relu" if has_epilogues else "")


LAYERS = [
    (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 8)),
    (nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (2, 4, 8, 8)),
    (nn.Conv3d(4, 6, 2, dilation=2), nn.BatchNorm3d(6, affine=False), (2, 4, 5, 5, 5)),
    (nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (2, 4, 8)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    (nn.ConvTranspose2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4), (2, 4, 5, 5)),
    (nn.ConvTranspose3d(4, 6, 2), nn.BatchNorm3d(6), (1, 4, 3, 3, 3)),
    (nn.Linear(5, 6), nn.BatchNorm1d(6), (7, 5)),
    (nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), (7, 5)),
]


@pytest.mark.parametrize(("layer", "bn", "shape"), LAYERS, ids=lambda v: type(v).__name__)
def test_layers(layer, bn, shape):
    torch.manual_seed(0)
    model = nn.Sequential(layer, bn)
    spread_statistics(model)
    assert_folded_right(model.eval(), torch.randn(shape), count=1)


class BeforeViews(nn.Module):
    """LeViT's: batch norm over the rows of a linear layer's result."""

    def __init__(self):
        super().__init__()
        self.linear, self.bn = nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8)
        spread_statistics(self)

    def forward(self, x):
        y = self.linear(x)
        return self.bn(y.flatten(0, 1)).reshape_as(y)


def test_through_views():
    torch.manual_seed(0)
    assert_folded_right(BeforeViews().eval(), torch.randn(2, 5, 6), count=1)


class SharedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        spread_statistics(self)

    def forward(self, x):
        return torch.cat([self.tower(x[..., :s, :s]).flatten() for s in (8, 4, 2)])


def test_a_shared_head_scales_its_weight_once():
    torch.manual_seed(0)
    graphs = []
    with testing.fresh_compile(), cbn.options(forward="fold"), torch.no_grad():
        backend = testing.post_grad_backend(on_graph=graphs.append)
        torch.compile(SharedHead().eval(), backend=backend)(torch.randn(1, 4, 8, 8))
    (graph,) = graphs
    scaled = [
        n for n in graph.nodes
        if n.target is torch.ops.aten.mul.Tensor and n.meta["val"].shape == (4, 4, 3, 3)
    ]  # fmt: skip
    assert len(scaled) == 1
    assert len(scaled[0].users) == 3


def scaled(x, w, s):
    return F.conv2d(x, w) * s


NOT_PER_CHANNEL = {
    "per sample": (2, 1, 1, 1),
    "per sample and channel": (2, 4, 1, 1),
    "per pixel": (1, 1, 4, 4),
    "per column": (4,),
}


@pytest.mark.parametrize("shape", NOT_PER_CHANNEL.values(), ids=NOT_PER_CHANNEL)
def test_not_per_channel(shape):
    torch.manual_seed(0)
    args = torch.randn(2, 3, 4, 4), torch.randn(4, 3, 1, 1), torch.randn(shape)
    out, records = folded(scaled, *args)
    assert not records
    torch.testing.assert_close(out, scaled(*args))


def squeeze_excite(x, w, v):
    y = F.conv2d(x, w)
    return F.conv2d(x, v) * y.mean((2, 3), keepdim=True)


@pytest.mark.parametrize("batch", [1, 2])
def test_scale_from_an_activation(batch):
    """With a batch of one, a scale per sample and channel is a scale per channel; still right."""
    torch.manual_seed(0)
    args = torch.randn(batch, 3, 4, 4), torch.randn(4, 3, 1, 1), torch.randn(4, 3, 1, 1)
    out, records = folded(squeeze_excite, *args)
    torch.testing.assert_close(out, squeeze_excite(*args))
    assert codes(records) == ["FOLDED"] * (batch == 1)


def uses_itself(x, w):
    y = F.conv2d(x, w)
    return y * y.mean((2, 3), keepdim=True) + y


def test_scale_from_the_layer_itself():
    args = torch.randn(1, 3, 4, 4), torch.randn(4, 3, 1, 1)
    out, records = folded(uses_itself, *args)
    assert not records
    torch.testing.assert_close(out, uses_itself(*args))


def test_two_layers_that_are_each_others_operand():
    """A classifier with two heads, as LeViT's, for a batch of one."""
    torch.manual_seed(0)
    args = torch.randn(1, 3), torch.randn(4, 3), torch.randn(4, 3), torch.randn(4)

    def fn(x, v, w, s):
        return (F.linear(x, v) * s + F.linear(x, w) / 3) / 2

    out, records = folded(fn, *args)
    assert "FOLDED" in codes(records)
    torch.testing.assert_close(out, fn(*args))
