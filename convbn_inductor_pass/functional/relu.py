"""ReLU that saves where its result is zero, for where nobody else saves the result.

Before:  ``y = relu(x)``, ``dx = dy`` where not ``y <= 0``;       saves ``y``
After:   the same bits, NaNs included;                            saves ``y <= 0``, a byte each
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._torch import eager as torch_eager

__all__ = ["relu"]


def relu(x: Tensor, inplace: bool = False) -> Tensor:
    """``x`` where it is positive, else 0. Twice differentiable.

    Args:
        x: any shape; no view if it is written to.
        inplace: whether to write the result to ``x``.
    """
    return _Relu.apply(x, inplace)


class _Relu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        y: Tensor = torch_eager.call_below(torch.relu_ if inplace else torch.relu, x)
        if inplace:
            ctx.mark_dirty(x)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(torch_eager.call_below(torch.le, y, 0))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, None]:
        if dy is None:
            return None, None
        (zero,) = ctx.saved_tensors
        return torch_eager.call_below(torch.masked_fill, dy, zero, 0), None
