"""Max-pooling that saves the indices of the maxima alone.

Before:  ``y, i = max_pool(x)``, ``dx = scatter(dy, i)``;         saves ``x`` and ``i``
After:   the same calls and bits;                                 saves ``i``

Of ``x`` backward reads the shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._torch import eager as torch_eager

__all__ = ["max_pool"]

aten = torch.ops.aten
_CALLS = {
    4: (aten.max_pool2d_with_indices.default, aten.max_pool2d_with_indices_backward.default),
    5: (aten.max_pool3d_with_indices.default, aten.max_pool3d_with_indices_backward.default),
}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def max_pool(x: Tensor, *geometry: Any) -> Tensor:
    """Maxima of the windows of ``x``. Twice differentiable.

    Args:
        x: [N, C, *spatial], of two or three dimensions.
        geometry: kernel size, stride, padding, dilation, each a list; whether to round sizes up.
    """
    return _MaxPool.apply(x, *geometry)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *geometry: Any) -> Tensor:
        y, indices = torch_eager.call_below(_CALLS[x.ndim][0], x, *geometry)
        ctx.save_for_backward(indices)
        ctx.set_materialize_grads(False)
        ctx.geometry, ctx.shape = geometry, x.shape
        last = not x.is_contiguous() and x.is_contiguous(memory_format=_CHANNELS_LAST[x.ndim])
        ctx.format = _CHANNELS_LAST[x.ndim] if last else torch.contiguous_format
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, *(None for _ in ctx.geometry)
        (indices,) = ctx.saved_tensors
        like = {"dtype": dy.dtype, "device": dy.device, "memory_format": ctx.format}
        x = torch.empty(ctx.shape, **like)  # for its shape; nobody reads an element
        call = _CALLS[x.ndim][1]
        dx = torch_eager.call_below(call, dy, x, *ctx.geometry, indices)
        return dx, *(None for _ in ctx.geometry)
