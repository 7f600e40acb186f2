"""Backward of a layer, alone and with an eval-mode batch norm after it.

``conv_bn`` states the gradients. They come from ``g`` and a scaled weight, without division:

    dx, dW' = the layer's, from g and A * W      dW = A * dW'      db = A * dbeta
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..graph.layout import Layout, channel_inner_product, scale_weight
from .half import gradient_scale


class Conv(NamedTuple):
    """Arguments of ``aten.convolution`` beside the tensors."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


def pair_backward(
    g: Tensor, scale: Tensor, layer: tuple[Any, ...], needs: tuple[bool, bool, bool]
) -> Any:
    """Gradients of a layer with a batch norm after it; ``<dW', W>`` and the sum of ``g``, [C].

    ``g`` is the gradient of the batch norm's output, ``scale`` is ``A``, in float32 or wider, as
    are the last two results; ``layer`` is what the layer computed with.
    """
    x, weight, bias, conv = layer
    need_dx, need_dw, need_db = needs
    acc, layout = scale.dtype, Layout() if conv is None else Layout(conv.transposed, conv.groups)
    sum_g = sum_positions(g)
    on_weight, t = scale, None
    if g.dtype == torch.float16:
        t = gradient_scale(g, scale)
        on_weight = scale / t
        g = g * per_channel(t, g).to(g.dtype)
    # What the forward multiplied with: under autocast, the weight after its cast.
    used = weight.to(x.dtype)
    folded = used
    if need_dx:  # else only its shape and layout are read
        folded = scale_weight(used.to(acc), on_weight, layout).to(x.dtype)
    dx, dfolded, _ = layer_backward(g, x, folded, conv, (need_dx, True, False))
    dfolded = dfolded.to(acc)
    inner = channel_inner_product(dfolded, used.to(acc), layout)
    inner = inner if t is None else inner / t
    dw = scale_weight(dfolded, on_weight, layout).to(weight.dtype) if need_dw else None
    db = (scale * sum_g).to(bias.dtype) if need_db and bias is not None else None
    return dx, dw, db, inner, sum_g


def layer_backward(
    g: Tensor, x: Tensor, weight: Tensor, conv: Conv | None, needs: tuple[bool, bool, bool]
) -> tuple[Any, Any, Any]:
    """Gradients of input, weight and bias, or None; in the dtype of ``g`` or a wider one."""
    need_dx, need_dw, need_db = needs
    weight = weight.to(g.dtype)
    dx = dw = None
    if conv is None:
        dx = g @ weight if need_dx else None
        dw = g.t() @ x if need_dw else None
    elif need_dx or need_dw:
        rest = (*conv, (need_dx, need_dw, False))
        dx, dw, _ = torch.ops.aten.convolution_backward(g, x, weight, None, *rest)
    return dx, dw, sum_positions(g) if need_db else None


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 2))


def sum_positions(g: Tensor) -> Tensor:
    """Sum over all but channels, in float32 or wider."""
    dtype = torch.promote_types(g.dtype, torch.float32)
    return g.sum([d for d in range(g.ndim) if d != 1], dtype=dtype)
