"""Graphs that the kernel half could get wrong, one by one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from test_forward import folded
from torch import Tensor


def test_two_layers_that_are_each_others_operand():
    """A classifier with two heads, as LeViT's, for a batch of one."""
    torch.manual_seed(0)
    args = torch.randn(1, 3), torch.randn(4, 3), torch.randn(4, 3), torch.randn(4)

    def fn(x: Tensor, v: Tensor, w: Tensor, s: Tensor) -> Tensor:
        return (F.linear(x, v) * s + F.linear(x, w) / 3) / 2

    out, records = folded(fn, *args)
    assert any(r.code.folded for r in records)
    torch.testing.assert_close(out, fn(*args))
