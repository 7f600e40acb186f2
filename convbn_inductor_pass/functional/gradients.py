"""Formulas of a layer and an eval-mode batch norm after it: folded, and backward.

``conv_bn`` states the gradients. They can be had from ``dc = A * g`` or from ``g``:

    from dc:  dx, dW, db = the layer's, from dc and W      <dW', W> = <dW, W> / A
    from g:   dx, dW' = the layer's, from g and A * W      dW = A * dW',  db = A * dbeta

The first way is eval mode's and scales no weight, but divides. So it is taken where no ``A`` is
small, which is looked up on CPU only: elsewhere a look waits for the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..graph.layout import Layout, channel_inner_product, output_padding, scale_weight
from .half import gradient_scale

__all__ = ["BatchNorm", "Conv", "accumulation_dtype", "cast", "fold_affine", "invstd_and_scale"]
__all__ += ["layer_backward", "pair_backward", "centred_bias", "sum_positions"]

aten = torch.ops.aten


class Conv(NamedTuple):
    """Arguments of ``aten.convolution`` beside the tensors."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


class BatchNorm(NamedTuple):
    """Tensors [C] of a batch norm in eval mode, and its epsilon."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    eps: float


class PairGradients(NamedTuple):
    """Of a layer; with them ``<dW', W>`` and the sum of ``g``, [C], in float32 or wider."""

    dx: Tensor | None
    dw: Tensor | None
    db: Tensor | None
    inner: Tensor
    sum_g: Tensor


def fold_affine(
    weight: Tensor, bias: Tensor | None, bn: BatchNorm, layout: Layout, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Weight and bias [C_out], in ``dtype``, of the layer that does what layer and norm do.

    The weight has the memory format of ``weight``. Both are computed in float32 or wider and
    rounded once.
    """
    acc = accumulation_dtype(dtype)
    _, scale = invstd_and_scale(bn.weight, bn.running_var, bn.eps, acc)
    shift = scale * centred_bias(bias, bn.running_mean, acc)
    if bn.bias is not None:
        shift = shift + bn.bias.to(acc)
    return scale_weight(weight.to(acc), scale, layout).to(dtype), shift.to(dtype)


def pair_backward(
    g: Tensor,
    dc: Tensor | None,
    scale: Tensor,
    layer: tuple[Tensor, Tensor, Tensor | None, Conv | None],
    needs: tuple[bool, bool, bool],
) -> PairGradients:
    """What a layer with a batch norm after it needs for all of its gradients and for dgamma.

    Args:
        g: gradient of the batch norm's output; for a linear layer [rows, C].
        dc: that of its input; None if nobody needs it.
        scale: ``A`` [C].
        layer: what the layer computed with: input, weight, bias, convolution.
        needs: whether the gradients of input, weight and bias are needed.
    """
    x, weight, bias, conv = layer
    need_dx, need_dw, need_db = needs
    acc, layout = scale.dtype, Layout() if conv is None else Layout(conv.transposed, conv.groups)
    wide = g.dtype == acc  # then the layer's own kernel may sum
    # What the forward multiplied with: under autocast, the weight after its cast.
    used = cast(weight, x.dtype)
    if wide and dc is not None and _can_divide_by(scale):
        dx, dw, db = layer_backward(dc, x, used, conv, (need_dx, True, True))
        inner = channel_inner_product(dw, used, layout) / scale
        dw, sum_g = dw if need_dw else None, db / scale
        return PairGradients(dx, dw, db if need_db else None, inner, sum_g)
    on_weight, t = scale, None
    if g.dtype == torch.float16:
        t = gradient_scale(g, scale)
        on_weight = scale / t
        sum_g = sum_positions(g, acc)
        g = g * t.to(g.dtype).reshape([1, -1] + [1] * (g.ndim - 2))
    folded = used
    if need_dx:  # else only its shape and layout are read
        folded = cast(scale_weight(cast(used, acc), on_weight, layout), x.dtype)
    dx, dfolded, db = layer_backward(g, x, folded, conv, (need_dx, True, wide))
    if t is None:
        sum_g = db if wide else sum_positions(g, acc)
    inner = channel_inner_product(cast(dfolded, acc), cast(used, acc), layout)
    inner = inner if t is None else inner / t
    dw = None
    if need_dw:
        dw = cast(scale_weight(cast(dfolded, acc), on_weight, layout), weight.dtype)
    db = cast(scale * sum_g, bias.dtype) if need_db and bias is not None else None
    return PairGradients(dx, dw, db, inner, sum_g)


def _can_divide_by(scale: Tensor) -> bool:
    return scale.is_cpu and scale.abs().amin().item() > 2**-20  # not if NaN


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)


def layer_backward(
    g: Tensor,
    x: Tensor | torch.Size,
    weight: Tensor,
    conv: Conv | None,
    needs: tuple[bool, bool, bool],
) -> Any:
    """Gradients of input, weight and bias, in the dtype of ``g``; None where not needed.

    Without the weight's, the shape of ``x`` is enough.
    """
    need_dx, need_dw, need_db = needs
    if not any(needs):
        return None, None, None
    weight = cast(weight, g.dtype)
    if not isinstance(x, Tensor) or not (need_dx or need_dw):
        shape = x.shape if isinstance(x, Tensor) else x
        rows = g.flatten(0, -2) if conv is None else g
        db = sum_positions(rows, accumulation_dtype(g.dtype)) if need_db else None
        return _input_gradient(g, weight, conv, shape) if need_dx else None, None, db
    if conv is None:
        g, rows = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = (g @ weight).reshape(x.shape) if need_dx else None
        return dx, g.t() @ rows if need_dw else None, g.sum(0) if need_db else None
    sizes = [g.shape[1]] if need_db else None
    return aten.convolution_backward.default(g, x, weight, sizes, *conv, needs)


def _input_gradient(g: Tensor, weight: Tensor, conv: Conv | None, shape: torch.Size) -> Tensor:
    """The gradient of a layer's input of this ``shape``, which is not there."""
    if conv is None:
        return (g @ weight).reshape(shape)
    if g.is_cuda and conv.groups > 1 and weight.shape[1] == 1:
        # cuDNN's transposed convolutions are slow at this, and this kernel asks for the shape only.
        x = g.new_empty(()).expand(shape)
        needs = (True, False, False)
        return aten.convolution_backward.default(g, x, weight, None, *conv, needs)[0]
    added = [0] * (g.ndim - 2)
    if not conv.transposed:
        each = zip(shape[2:], g.shape[2:], weight.shape[2:], *conv[:3], strict=True)
        added = [output_padding(*sizes) for sizes in each]
    geometry = (*conv[:3], not conv.transposed, added, conv.groups)
    dx: Tensor = aten.convolution.default(g, weight, None, *geometry)
    for dim in range(2, dx.ndim):  # longer where the output padding is the stride or more
        dx = dx.narrow(dim, 0, shape[dim]) if dx.shape[dim] > shape[dim] else dx
    return dx


def sum_positions(g: Tensor, dtype: torch.dtype) -> Tensor:
    return g.sum([d for d in range(g.ndim) if d != 1], dtype=dtype)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def invstd_and_scale(
    gamma: Tensor | None, running_var: Tensor, eps: float, acc: torch.dtype
) -> tuple[Tensor, Tensor]:
    invstd = (cast(running_var, acc) + eps).rsqrt()
    return invstd, invstd if gamma is None else cast(gamma, acc) * invstd


def centred_bias(bias: Tensor | None, mean: Tensor, acc: torch.dtype) -> Tensor:
    # Subtracted before anything else is done, because the two may be large and nearly equal.
    return -cast(mean, acc) if bias is None else cast(bias, acc) - cast(mean, acc)
