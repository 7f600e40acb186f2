"""Autocast and half precision, and float16 steps that a gradient scaler skips."""

import copy

import pytest
import torch
from common import ConvBN, Residual, example_input
from eager_helpers import codes, run
from torch import nn

from convbn_inductor_pass import Code, turn_on


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model, x = Residual(), torch.randn(2, 3, 8, 8)
    _, exact = run(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cpu", dtype):
        (eval_out,), by_eval = run(model, x)
        turn_on(model)
        (tune_out,), by_tune = run(model, x)
    assert codes(model) == [Code.FUSED] * Residual.pairs
    assert tune_out.dtype == eval_out.dtype

    def worst(gradients):
        return max((g - exact[n]).abs().max() / exact[n].abs().max() for n, g in gradients.items())

    assert worst(by_tune) <= 2 * worst(by_eval) + torch.finfo(dtype).eps
    assert all(g.dtype == torch.float32 for g in by_tune.values())


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
