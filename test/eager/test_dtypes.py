"""Autocast and half precision, and float16 steps that a gradient scaler skips."""

import copy
import statistics

import pytest
import torch
import torch.nn.functional as F
from common import ConvBN, Residual, example_input
from eager_helpers import codes, run
from torch import nn

from convbn_inductor_pass import Code, turn_on


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Of several models the median: rounding flips signs before a ReLU, in eval mode as well."""
    tune_errors, eval_errors = [], []
    for seed in range(7):
        torch.manual_seed(seed)
        model, x = Residual(), torch.randn(8, 3, 16, 16)
        _, exact = run(copy.deepcopy(model).double(), x.double())
        with torch.autocast("cpu", dtype):
            (eval_out,), by_eval = run(model, x)
            turn_on(model)
            (tune_out,), by_tune = run(model, x)
        assert codes(model) == [Code.FUSED] * Residual.pairs
        assert tune_out.dtype == eval_out.dtype
        assert all(g.dtype == torch.float32 for g in by_tune.values())
        for errors, gradients in ((tune_errors, by_tune), (eval_errors, by_eval)):
            relative = [(g - exact[n]).norm() / exact[n].norm() for n, g in gradients.items()]
            errors.append(max(relative).item())
    assert statistics.median(tune_errors) <= 1.5 * statistics.median(eval_errors)


def test_half_precision_layer_before_single_precision_norm():
    model = ConvBN(nn.Conv2d(4, 6, 3))
    model.layer.bfloat16()
    x = example_input(model.layer).bfloat16()
    expected, by_eval = run(model, x)
    got, by_tune = run(turn_on(model), x)
    assert codes(model) == [Code.FUSED]
    assert got[0].dtype == expected[0].dtype == torch.bfloat16
    torch.testing.assert_close(got[0], expected[0], rtol=2e-2, atol=2e-2)
    assert {n: g.dtype for n, g in by_tune.items()} == {n: g.dtype for n, g in by_eval.items()}


def zero_initialised():
    """As the last batch norm of a residual branch, over a convolution of small variance."""
    conv, bn = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
    nn.init.zeros_(bn.weight)
    bn.running_var.fill_(1e-2)
    return nn.Sequential(conv, bn).eval()


def loss_of(model, x, target):
    with torch.autocast("cpu", torch.float16):
        y = model(x).float()
    return F.mse_loss(y, target, reduction="none").mean((1, 2, 3)).sum()


@pytest.mark.parametrize("loss_scale", [2.0**20, 2.0**24])
def test_zero_gamma_and_a_large_loss_scale(loss_scale):
    model = zero_initialised()
    x, target = torch.randn(8, 16, 28, 28, requires_grad=True), torch.randn(8, 16, 28, 28)

    def step():
        grads = torch.autograd.grad(loss_of(model, x, target) * loss_scale, model.parameters())
        return [g / loss_scale for g in grads]

    by_eval = step()
    turn_on(model)
    by_tune = step()
    assert codes(model) == [Code.FUSED]
    torch.testing.assert_close(by_tune, by_eval, rtol=1e-3, atol=2e-4)


def test_training_under_a_gradient_scaler_goes_on():
    """No step is skipped that eval mode takes, from a zero-initialised gamma on."""
    start = zero_initialised()
    x, target = torch.randn(8, 16, 28, 28), torch.randn(8, 16, 28, 28)

    def train(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**27, growth_interval=2)
        skipped, losses = 0, []
        for _ in range(12):
            optimizer.zero_grad()
            loss = loss_of(model, x, target)
            scaler.scale(loss).backward()
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            skipped += scaler.get_scale() < before
            losses.append(loss.item())
        return skipped, losses

    eval_skipped, eval_losses = train(copy.deepcopy(start))
    tune_skipped, tune_losses = train(turn_on(start))
    assert eval_skipped > 0  # the scale grows until float16 is full
    assert tune_skipped <= eval_skipped
    assert eval_losses[-1] < eval_losses[0]
    torch.testing.assert_close(tune_losses[-1], eval_losses[-1], rtol=1e-2, atol=0)
