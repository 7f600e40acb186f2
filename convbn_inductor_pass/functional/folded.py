"""The batch norm folded into the weight on the fly: tune mode's forward outside torch.compile.

Before:  ``c = conv(x, W, b)``;  ``y = gamma * (c - mean) * invstd + beta``
After:   ``y = conv(x, s * W, s * (b - mean) + beta)`` with ``s = gamma * invstd``

One convolution, no pass over the activations, and nothing to keep for backward but ``x``. The
gradient is :class:`~convbn_inductor_pass.autograd.ConvBNEval`'s. Scale and shift are computed
in float32 or wider and rounded once, to the dtype that the convolution computes in; the folded
weight has the memory format of the weight. It is live: nothing is stale after an optimizer step.

Unlike the compiled pass, whose forward has eval mode's bits, this one differs by rounding: the
product with ``s`` is rounded before the sum instead of after it.

Source: "Efficient ConvBN Blocks for Transfer Learning and Beyond", arXiv 2305.11624, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..graph.layout import Layout, scale_weight
from .conv_bn import Conv, ConvBNEval, accumulation_dtype, apply_layer, autocast_off

__all__ = ["ConvBNFolded", "ConvBNFoldedEager", "fold_affine"]


def fold_affine(
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    layout: Layout,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Weight and bias [C_out], in ``dtype``, of the layer that does what layer and norm do."""
    acc = accumulation_dtype(dtype)
    scale = (running_var.to(acc) + eps).rsqrt()
    if bn_weight is not None:
        scale = bn_weight.to(acc) * scale
    # The bias first, because bias and mean may be large and nearly equal.
    shift = -running_mean.to(acc) if bias is None else bias.to(acc) - running_mean.to(acc)
    shift = scale * shift
    if bn_bias is not None:
        shift = shift + bn_bias.to(acc)
    return scale_weight(weight.to(acc), scale, layout).to(dtype), shift.to(dtype)


class ConvBNFolded(ConvBNEval):
    """``batch_norm(conv(x))`` with running statistics as one convolution."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
        conv: Conv | None,
    ) -> Tensor:
        layout = Layout() if conv is None else Layout(conv.transposed, conv.groups)
        with autocast_off(x.device.type):
            folded, shift = fold_affine(
                weight, bias, bn_weight, bn_bias, running_mean, running_var, eps, layout, x.dtype
            )
            return apply_layer(x, folded, shift, conv)


class ConvBNFoldedEager(ConvBNFolded):
    """The same outside torch.func, which spares binding the signature anew in every call."""

    generate_vmap_rule = False
    setup_context = torch.autograd.Function.setup_context

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = ConvBNFolded.forward(*inputs)
        ConvBNFolded.setup_context(ctx, inputs, output)
        return output
