"""Backward of a layer, alone and with an eval-mode batch norm after it.

``conv_bn`` states the gradients. They come from ``g`` and a scaled weight, without division:

    dx, dW' = the layer's, from g and A * W      dW = A * dW'      db = A * dbeta
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..graph.layout import Layout, channel_inner_product, scale_weight
from .half import gradient_scale

__all__ = ["Conv", "accumulation_dtype", "cast", "layer_backward", "pair_backward"]
__all__ += ["per_channel", "sum_positions"]


class Conv(NamedTuple):
    """Arguments of ``aten.convolution`` beside the tensors."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


def pair_backward(
    g: Tensor,
    scale: Tensor,
    layer: tuple[Tensor, Tensor, Tensor | None, Conv | None],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of a layer with a batch norm after it; ``<dW', W>`` and the sum of ``g``, [C].

    Args:
        g: gradient of the batch norm's output; for a linear layer [rows, C].
        scale: ``A`` [C], in float32 or wider, as are the last two results.
        layer: what the layer computed with: input, weight, bias, convolution.
        needs: whether the gradients of input, weight and bias are needed.
    """
    x, weight, bias, conv = layer
    need_dx, need_dw, need_db = needs
    acc, layout = scale.dtype, Layout() if conv is None else Layout(conv.transposed, conv.groups)
    sum_g = None if g.dtype == acc else sum_positions(g, acc)  # else the layer's kernel may sum
    t = None
    if g.dtype == torch.float16:
        t = gradient_scale(g, scale)
        g = g * per_channel(t, g).to(g.dtype)
    on_weight = scale if t is None else scale / t
    # What the forward multiplied with: under autocast, the weight after its cast.
    used = cast(weight, x.dtype)
    folded = used
    if need_dx:  # else only its shape and layout are read
        folded = cast(scale_weight(cast(used, acc), on_weight, layout), x.dtype)
    dx, dfolded, db = layer_backward(g, x, folded, conv, (need_dx, True, sum_g is None))
    sum_g = db if sum_g is None else sum_g
    dfolded = cast(dfolded, acc)
    inner = channel_inner_product(dfolded, cast(used, acc), layout)
    inner = inner if t is None else inner / t
    dw = cast(scale_weight(dfolded, on_weight, layout), weight.dtype) if need_dw else None
    db = cast(scale * sum_g, bias.dtype) if need_db and bias is not None else None
    return dx, dw, db, inner, sum_g


def layer_backward(
    g: Tensor, x: Tensor, weight: Tensor, conv: Conv | None, needs: tuple[bool, bool, bool]
) -> Any:
    """Gradients of input, weight and bias, in the dtype of ``g``; None where not needed."""
    need_dx, need_dw, need_db = needs
    weight = cast(weight, g.dtype)
    if conv is None:
        dx = g @ weight if need_dx else None
        return dx, g.t() @ x if need_dw else None, g.sum(0) if need_db else None
    if not (need_dx or need_dw):  # the kernel would compute the weight's, too
        return None, None, sum_positions(g, accumulation_dtype(g.dtype)) if need_db else None
    sizes = [g.shape[1]] if need_db else None
    return torch.ops.aten.convolution_backward.default(g, x, weight, sizes, *conv, needs)


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape([1, -1] + [1] * (like.ndim - 2))


def sum_positions(g: Tensor, dtype: torch.dtype) -> Tensor:
    return g.sum([d for d in range(g.ndim) if d != 1], dtype=dtype)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
