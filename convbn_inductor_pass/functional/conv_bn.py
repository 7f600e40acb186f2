"""A layer followed by an eval-mode batch norm, as one function that saves no activation but ``x``.

Before:  ``c = layer(x, W, b)``;  ``y = gamma * (c - mean) * invstd + beta``;  saves ``x`` and ``c``
After:   ``y = layer(x, A * W, A * (b - mean) + beta)``;                       saves ``x``

with ``invstd = (running_var + eps) ** -0.5`` and ``A = gamma * invstd``, per channel. With ``g``
the gradient of ``y`` and ``<,>`` the inner product per output channel, the gradients are

    dx, dW' = convolution_backward(g, x, A * W)    dbeta = sum of g over all but channels
    dW = A * dW'                                   dgamma = invstd * (<dW', W> + (b - mean) * dbeta)
    db = A * dbeta

``<dW', W>`` equals the sum of ``g * layer(x, W)``: what eval mode reads the saved layer output for
comes out of the weight gradient that is computed anyway. Nothing is divided by gamma. The scaled
weight is recomputed each call, in forward and in backward, from the parameters as they are then.

Numerics. Everything of channel size, and sums over activations, are float32 for half-precision
inputs (float64 for float64); each gradient is rounded once to its parameter's dtype. The output
differs from eval mode's by rounding, since the product with ``A`` is rounded before the sum and not
after it; in float16 that costs digits where ``A * W`` is below 2 ** -14. The errors of dx, dW and
dbeta are eval mode's. dgamma is as accurate as the weight gradient; like eval mode's it cancels
where the mean of ``c`` is far larger than its deviation. ``half`` keeps float16 gradients in range.

Declines: no forward-mode rule and no vmap rule, for which callers run layer and batch norm as
written.

Source: "Efficient ConvBN Blocks for Transfer Learning and Beyond", arXiv 2305.11624, section 3; the
formula for dgamma follows from its equation for the folded weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch import eager as torch_eager
from ..graph.layout import Layout, channel_inner_product, scale_weight
from .half import gradient_scale

__all__ = ["BatchNorm", "Conv", "conv_bn_eval", "fold_affine"]

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


def conv_bn_eval(
    x: Tensor, weight: Tensor, bias: Tensor | None, bn: BatchNorm, conv: Conv | None
) -> Tensor:
    """Batched convolution, plain or transposed, or linear layer; then batch norm. Runs once.

    Twice differentiable. Layer and batch norm compute in the dtype of ``x``; parameters may have a
    wider one, as under autocast, and get their gradients in it.

    Args:
        x: [N, C_in, *spatial]; for a linear layer [..., C_in] of at least two dimensions.
        weight: laid out as in :mod:`convbn_inductor_pass.graph.layout`.
        bias: [C_out].
        bn: the batch norm, of C_out channels.
        conv: how the convolution goes; None for a linear layer.

    Returns:
        [N, C_out, *spatial'], of a linear layer [rows, C_out], in the dtype of ``x``.
    """
    return _ConvBNEval.apply(x, weight, bias, *bn, conv)


def fold_affine(
    weight: Tensor, bias: Tensor | None, bn: BatchNorm, layout: Layout, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Weight and bias [C_out], in ``dtype``, of the layer that does what layer and norm do.

    The weight has the memory format of ``weight``. Both are computed in float32 or wider and
    rounded once.
    """
    acc = _accumulation_dtype(dtype)
    _, scale = _invstd_and_scale(bn.weight, bn.running_var, bn.eps, acc)
    shift = scale * _centred_bias(bias, bn.running_mean, acc)
    if bn.bias is not None:
        shift = shift + bn.bias.to(acc)
    return scale_weight(weight.to(acc), scale, layout).to(dtype), shift.to(dtype)


class _ConvBNEval(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *bn_and_conv: Any
    ) -> Tensor:
        bn, conv = BatchNorm(*bn_and_conv[:-1]), bn_and_conv[-1]
        ctx.save_for_backward(x, weight, bias, bn.weight, bn.running_mean, bn.running_var)
        ctx.eps, ctx.conv = bn.eps, conv
        ctx.bn_bias_dtype = None if bn.bias is None else bn.bias.dtype
        with torch_eager.autocast_off():
            folded, shift = fold_affine(weight, bias, bn, _layout(conv), x.dtype)
            if conv is None:
                return F.linear(x, folded, shift).flatten(0, -2)
            return aten.convolution.default(x, folded, shift, *conv)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        with torch_eager.autocast_off():
            return _backward(ctx, g)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, gamma, running_mean, running_var = ctx.saved_tensors
    need_dx, need_dw, need_db, need_dgamma, need_dbeta = ctx.needs_input_grad[:5]
    layout, acc = _layout(ctx.conv), _accumulation_dtype(g.dtype)
    dx: Any = None
    dw = db = dgamma = dbeta = dx
    invstd, scale = _invstd_and_scale(gamma, running_var, ctx.eps, acc)
    if need_db or need_dgamma or need_dbeta:
        sum_g = g.sum([d for d in range(g.ndim) if d != 1], dtype=acc)
    on_weight, t = scale, None
    if need_dx or need_dw or need_dgamma:
        if g.dtype == torch.float16:
            t = gradient_scale(g, scale)
            on_weight = scale / t
            g = g * t.to(g.dtype).reshape([1, -1] + [1] * (g.ndim - 2))
        # What the forward multiplied with: under autocast, the weight after its cast.
        used_weight = folded = weight.to(x.dtype)
        if need_dx:  # else only its shape and layout are read
            folded = scale_weight(used_weight.to(acc), on_weight, layout).to(x.dtype)
        dx, dfolded = _layer_backward(g, x, folded, ctx.conv, need_dx, need_dw or need_dgamma)
    if need_dw:
        dw = scale_weight(dfolded.to(acc), on_weight, layout).to(weight.dtype)
    if need_db:
        db = (scale * sum_g).to(bias.dtype)
    if need_dgamma:
        inner = channel_inner_product(dfolded.to(acc), used_weight.to(acc), layout)
        inner = inner if t is None else inner / t
        used_bias = None if bias is None else bias.to(x.dtype)
        offset = _centred_bias(used_bias, running_mean, acc) * sum_g
        dgamma = (invstd * (inner + offset)).to(gamma.dtype)
    if need_dbeta:
        dbeta = sum_g.to(ctx.bn_bias_dtype)
    return dx, dw, db, dgamma, dbeta, None, None, None, None


def _layer_backward(
    g: Tensor, x: Tensor, weight: Tensor, conv: Conv | None, need_dx: bool, need_dw: bool
) -> Any:
    if conv is None:
        dx = (g @ weight).reshape(x.shape) if need_dx else None
        dw = g.t() @ x.reshape(-1, x.shape[-1]) if need_dw else None
        return dx, dw
    mask = [need_dx, need_dw, False]
    return aten.convolution_backward.default(g, x, weight, None, *conv, mask)[:2]


def _layout(conv: Conv | None) -> Layout:
    return Layout() if conv is None else Layout(conv.transposed, conv.groups)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _invstd_and_scale(
    gamma: Tensor | None, running_var: Tensor, eps: float, acc: torch.dtype
) -> tuple[Tensor, Tensor]:
    invstd = (running_var.to(acc) + eps).rsqrt()
    return invstd, invstd if gamma is None else gamma.to(acc) * invstd


def _centred_bias(bias: Tensor | None, mean: Tensor, acc: torch.dtype) -> Tensor:
    # Subtracted before anything else is done, because the two may be large and nearly equal.
    return -mean.to(acc) if bias is None else bias.to(acc) - mean.to(acc)
