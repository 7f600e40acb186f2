"""Backward of a layer with an eval-mode batch norm after it.

``conv_bn`` states the gradients. They come from ``g`` and a scaled weight, without division:

    dx, dW' = the layer's, from g and A * W      dW = A * dW'      db = A * dbeta
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..graph.layout import Layout, along_output_channels, channel_inner_product


class Conv(NamedTuple):
    """Arguments of ``aten.convolution`` beside the tensors."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


def pair_backward(
    g: Tensor, scale: Tensor, layer: tuple[Tensor, Tensor, Conv | None], needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Gradients of a layer's input and weight; ``<dW', W>`` and the sum of ``g``, [C].

    ``g`` is the gradient of the batch norm's output, ``scale`` is ``A``, in float32 or wider, as
    are all but the first result; ``layer`` what the layer computed with, after autocast's casts.
    """
    (x, weight, conv), (need_dx, need_dw) = layer, needs
    acc, layout = scale.dtype, Layout() if conv is None else Layout(conv.transposed, conv.groups)
    sum_g = sum_positions(g)
    on_weight, t = scale, None
    if g.dtype == torch.float16:
        t = gradient_scale(g, scale)
        on_weight = scale / t
        g = g * per_channel(t, g).to(g.dtype)
    on_weight = along_output_channels(on_weight, weight.shape, layout)
    # Without a gradient of x, only its shape and layout are read.
    folded = (weight * on_weight).to(x.dtype) if need_dx else weight
    dx = None
    if conv is None:
        dx = g @ folded if need_dx else None
        dfolded = g.t() @ x
    else:
        rest = (*conv, (need_dx, True, False))
        dx, dfolded, _ = torch.ops.aten.convolution_backward(g, x, folded, None, *rest)
    del folded
    dfolded = dfolded.to(acc)
    inner = channel_inner_product(dfolded, weight, layout)
    inner = inner if t is None else inner / t
    if not need_dw:
        return dx, None, inner, sum_g
    # In place, unless autograd looks: new memory of the weight's size would cost as much again.
    scaled = torch.mul if torch.is_grad_enabled() else Tensor.mul_
    return dx, scaled(dfolded, on_weight), inner, sum_g


def gradient_scale(g: Tensor, scale: Tensor) -> Tensor:
    """``t``, by which a float16 backward shares the scale of a batch norm between ``g`` and ``W``.

    Before:  ``dx, dW' = convolution_backward(g, x, A * W)``;            ``dW = A * dW'``
    After:   ``dx, dW' = convolution_backward(t * g, x, (A / t) * W)``;  ``dW = (A / t) * dW'``
             ``<dW', W>`` in the formula of dgamma becomes ``<dW', W> / t``

    with ``g`` [N, C, ...] the gradient of the batch norm's output, float16, ``A = gamma * invstd``,
    which is ``scale``, and ``t`` a power of two, both [C] and float32. Products are rounded once.
    With ``norm`` the L2 norm over all but channels

        ``log2(t) = clamp(max(-2 - ceil(log2(norm(g))), ceil(log2(abs(A))) - 8), -24, 15)``
        ``t = 1`` where ``norm(g)`` is 0 or NaN, or ``A`` is NaN

    Why (docs/numerics.md): ``dW'``, rounded to float16 before it is scaled, is eval mode's dW
    divided by ``A`` if ``t = 1``, which may overflow or underflow where that does not.

    * First term: ``norm(t * g)`` is in (1/8, 1/4]. By Cauchy-Schwarz ``abs(dW') <= norm(x) / 4``:
      it fits if the root mean square of ``x`` is below 256 at a million positions.
    * Second term: ``abs(A / t) <= 256``, so that the scaled weight fits if ``abs(W) < 255`` (and
      ``abs(A) <= 2 ** 23``). Where it is the larger one, ``t * g`` and ``dW'`` are at most 1/128 of
      the gradients that eval mode rounds to float16.
    * The clamp lets ``t`` fit float16, where multiplying with it is exact down to 2 ** -14.

    No graph is recorded: rounding up has no gradient, and no gradient depends on ``t``.
    """
    with torch.no_grad():
        positions = [d for d in range(g.ndim) if d != 1]
        norm = torch.linalg.vector_norm(g, 2, positions, dtype=torch.float32)
        by_gradient = -2 - norm.log2().ceil()
        by_scale = scale.abs().log2().ceil() - 8
        exponent = torch.maximum(by_gradient, by_scale).clamp(-24, 15)
        return torch.where((norm > 0) & exponent.isfinite(), exponent, 0.0).exp2()


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 2))


def sum_positions(g: Tensor) -> Tensor:
    """Sum over all but channels, in float32 or wider."""
    dtype = torch.promote_types(g.dtype, torch.float32)
    return g.sum([d for d in range(g.ndim) if d != 1], dtype=dtype)
