"""Folded forwards follow every change of parameters and statistics at once; frozen ones do not."""

from __future__ import annotations

import copy

import pytest
import torch
from common import spread_statistics
from passes.forward_folding.folding import codes, layer_records
from torch import nn
from torch._dynamo.utils import counters

import convbn_inductor_pass as cbn
from convbn_inductor_pass import testing

LAYERS = 3


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 1, groups=2, bias=False), nn.BatchNorm2d(8), nn.SiLU()),
        *(nn.ConvTranspose2d(8, 4, 2), nn.BatchNorm2d(4)),
    )
    return spread_statistics(model).eval()


def step_of_an_optimizer(model):
    model(torch.ones(1, 3, 8, 8)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def load_other_weights(model):
    other = copy.deepcopy(model)
    for tensor in other.state_dict().values():
        if tensor.is_floating_point():
            tensor.mul_(1.5)
    model.load_state_dict(other.state_dict())


def statistics_of_a_batch(model):
    model.train()(torch.randn(4, 3, 8, 8) * 2 + 1)
    model.eval()


def in_place(name):
    def edit(model):
        for module in model:
            if isinstance(getattr(module, name, None), torch.Tensor):
                getattr(module, name).mul_(1.5)

    return edit


def through_data(name):
    def edit(model):
        for module in model:
            if isinstance(getattr(module, name, None), torch.Tensor):
                getattr(module, name).data.mul_(0.75)

    return edit


EDITS = [
    *(step_of_an_optimizer, load_other_weights, statistics_of_a_batch),
    *(in_place(n) for n in ("running_mean", "running_var")),
    *(torch.no_grad()(in_place(n)) for n in ("weight", "bias")),
    *(through_data(n) for n in ("running_mean", "running_var", "weight", "bias")),
]


@pytest.mark.parametrize("forward", ["fold", "auto"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_every_edit_shows_in_the_next_call(forward, context):
    model, x = make_model(), torch.randn(2, 3, 24, 24)
    counters.clear()
    cbn.clear_records()
    with testing.fresh_compile(), cbn.options(forward=forward):
        compiled = torch.compile(model)
        with context():
            before = compiled(x).clone()
        assert codes(layer_records()) == ["FOLDED"] * LAYERS
        for edit in EDITS:
            edit(model)
            with context():
                out = compiled(x).clone()
                torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-4)
            assert not torch.allclose(out, before, rtol=1e-2, atol=1e-2)
            before = out
        assert counters["stats"]["unique_graphs"] == 1  # not because it was compiled again


def test_training_follows_the_optimizer():
    """The output before a SiLU is saved for backward in any case; its layer is not folded."""
    model, x = make_model(), torch.randn(2, 3, 24, 24)
    twin = copy.deepcopy(model)
    cbn.clear_records()
    losses = []
    with testing.fresh_compile(), cbn.options(forward="fold"):
        for forward, parameters in (
            (torch.compile(model), model.parameters()),
            (twin, twin.parameters()),
        ):
            optimizer = torch.optim.SGD(parameters, lr=0.05)
            losses.append([])
            for _ in range(4):
                loss = forward(x).square().mean()
                losses[-1].append(loss.item())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    assert codes(layer_records()).count("FOLDED") == LAYERS - 1
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)
    assert losses[1][-1] < 0.95 * losses[1][0]


def test_freezing_goes_stale():
    """What folding live weights is for. (Constants that needed no folding may even be live.)"""
    model, x = make_model(), torch.randn(2, 3, 24, 24)
    with testing.fresh_compile(), torch._inductor.config.patch(freezing=True):
        compiled = torch.compile(model)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
        for edit in EDITS:
            edit(model)
        with torch.no_grad():
            assert not torch.allclose(compiled(x), model(x), rtol=1e-2, atol=1e-2)
