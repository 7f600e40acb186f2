"""Graphs that the kernel half could get wrong, one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_forward import folded
from torch import Tensor

from convbn_inductor_pass import ForwardCode


def test_two_layers_that_are_each_others_operand():
    """A classifier with two heads, as LeViT's, for a batch of one."""
    torch.manual_seed(0)
    args = torch.randn(1, 3), torch.randn(4, 3), torch.randn(4, 3), torch.randn(4)

    def fn(x: Tensor, v: Tensor, w: Tensor, s: Tensor) -> Tensor:
        return (F.linear(x, v) * s + F.linear(x, w) / 3) / 2

    out, records = folded(fn, *args)
    assert any(r.code.folded for r in records)
    torch.testing.assert_close(out, fn(*args))


def scaled_by(*numbers: float):
    def fn(x: Tensor, w: Tensor) -> Tensor:
        y = F.conv2d(x, w)
        for number in numbers:
            y = y * number if number else y / number
        return y + 1

    return fn


@pytest.mark.parametrize(
    "numbers",
    [(1e20, 1e20), (1e-20, 1e-30), (1e30, 1e30, 1e-30), (float("inf"),), (float("nan"),), (0.0,)],
)
def test_constants_that_do_not_fit_together(numbers):
    """As written they meet the activations one by one, which may be small or large."""
    x = torch.randn(1, 3, 4, 4) * (1e-20 if numbers[0] > 1 else 1e20)
    w = torch.randn(4, 3, 1, 1)
    fn = scaled_by(*numbers)
    out, (record,) = folded(fn, x, w)
    assert record.code is ForwardCode.NUMBER_RANGE
    torch.testing.assert_close(out, fn(x, w), equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.float32, torch.int8),
        (torch.bfloat16, torch.int8),
        (torch.bfloat16, torch.float8_e4m3fn),
    ],
)
def test_quantised_weights_are_left_to_inductor(dtype, stored):
    """Its patterns for integer weights look for the scale after the product."""
    torch.manual_seed(0)
    x, w, s = torch.randn(8, 16, dtype=dtype), torch.randn(4, 16) * 20, torch.randn(4, dtype=dtype)
    w = w.to(stored)
    for fn in (
        lambda x, w, s: F.linear(x, w.to(x.dtype)) * s,
        lambda x, w, s: F.conv1d(x[..., None], (w.to(x.dtype) - 1)[..., None]) * s[:, None],
    ):
        out, (record,) = folded(fn, x, w, s)
        assert record.code is ForwardCode.QUANTISED
        torch.testing.assert_close(out, fn(x, w, s))
