"""The tune-mode gradient of a convolution followed by an eval-mode batch norm.

Before, what autograd keeps for ``y = bn(conv(x))``: ``x`` (for dW) and ``c = conv(x)``
(for dgamma). After, only ``x``. With ``dy`` the gradient of ``y``,

    invstd = (running_var + eps) ** -0.5        s = gamma * invstd        W' = s * W

    dx, dW' = convolution_backward(dy, x, W')   dbeta = sum of dy over all but channels
    dW = s * dW'                                dgamma = invstd * (<dW', W> + (b - mean) * dbeta)
    db = s * dbeta

where ``<dW', W>`` is the inner product per output channel. It equals the sum of
``dy * conv(x, W)``: the convolution's output, which eval mode keeps in memory, is recovered
from the weight gradient that is computed anyway. Nothing is divided by gamma, so
zero-initialised gammas are fine. W' is a pointwise function of live parameters; it is
computed in backward and never kept.

The forward is the one that was written: the same convolution, the same batch norm, in the
same order, so its bits are eval mode's. Only what is kept for backward changes.

Source: "Efficient ConvBN Blocks for Transfer Learning and Beyond", arXiv 2305.11624, section
3; the formula for dgamma follows from its equation for the folded weight.

Numerics. Sums over activations and everything of channel size are computed in float32 for
half-precision inputs (float64 for float64); each gradient is rounded once to its parameter's
dtype. The errors of dx, dW and dbeta are eval mode's. ``dgamma`` comes out of the weight gradient
and is as accurate as that: measured in float32, 1 to 14 times eval mode's error, which is 2e-7 to
2e-6 of the largest number where the mean of ``c`` is not above its deviation. It cancels where
the mean is far larger, and so does eval mode's: both errors grow with the ratio. Taking the inner
product in float64, or about the mean of ``x``, does not help, since the error is made in the sums
of ``convolution_backward``. ``python -m bench.gradient_error`` measures all this.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..graph.layout import Layout, channel_inner_product, scale_weight

__all__ = ["conv_bn_eval", "linear_bn_eval"]

aten = torch.ops.aten


class Conv(NamedTuple):
    """Arguments of ``aten.convolution`` beside the tensors. ``None`` stands for a linear layer."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def apply_layer(x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv | None) -> Tensor:
    if conv is None:
        out = F.linear(x, weight, bias)
        return out.reshape(-1, out.shape[-1]) if out.ndim > 2 else out
    return aten.convolution.default(
        x,
        weight,
        bias,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.transposed,
        conv.output_padding,
        conv.groups,
    )


def _layer_backward(
    dy: Tensor, x: Tensor, weight: Tensor, conv: Conv | None, need_dx: bool, need_dw: bool
) -> tuple[Tensor | None, Tensor | None]:
    if conv is None:
        dx = (dy @ weight).reshape(x.shape) if need_dx else None
        dw = dy.t() @ x.reshape(-1, x.shape[-1]) if need_dw else None
        return dx, dw
    dx, dw, _ = aten.convolution_backward.default(
        dy,
        x,
        weight,
        None,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.transposed,
        conv.output_padding,
        conv.groups,
        [need_dx, need_dw, False],
    )
    return dx, dw


def _is_autocast_enabled(device_type: str) -> bool:
    # The meta device, for one, knows no autocast and raises when asked for it.
    known = torch.amp.is_autocast_available(device_type)
    return known and torch.is_autocast_enabled(device_type)


@contextlib.contextmanager
def autocast_off(device_type: str) -> Iterator[None]:
    """Compute in the dtypes given: autocast's casts were made before, where autograd sees them."""
    if _is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            yield
    else:
        yield


class ConvBNEval(torch.autograd.Function):
    """``batch_norm(conv(x))`` with running statistics, that saves ``x`` and no activation else.

    Called through :func:`conv_bn_eval` and :func:`linear_bn_eval`. ``x`` has the dtype that
    the convolution computes in; ``weight`` and ``bias`` may have a wider one (autocast), and
    get their gradients in it. Twice differentiable; has a vmap rule; no forward-mode rule.
    """

    generate_vmap_rule = True

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
        with autocast_off(x.device.type):
            bias = None if bias is None else bias.to(x.dtype)
            c = apply_layer(x, weight.to(x.dtype), bias, conv)
            return F.batch_norm(
                c, running_mean, running_var, bn_weight, bn_bias, training=False, eps=eps
            )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, bn_weight, bn_bias, running_mean, running_var, eps, conv = inputs
        ctx.save_for_backward(x, weight, bias, bn_weight, running_mean, running_var)
        ctx.eps, ctx.conv = eps, conv
        ctx.bn_bias_dtype = None if bn_bias is None else bn_bias.dtype

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, bn_weight, running_mean, running_var = ctx.saved_tensors
        need_dx, need_dw, need_db, need_dgamma, need_dbeta = ctx.needs_input_grad[:5]
        conv: Conv | None = ctx.conv
        layout = Layout() if conv is None else Layout(conv.transposed, conv.groups)
        dx: Any = None
        dw = db = dgamma = dbeta = dfolded = sum_dy = dx
        with autocast_off(x.device.type):
            acc = accumulation_dtype(dy.dtype)
            invstd = (running_var.to(acc) + ctx.eps).rsqrt()
            scale = invstd if bn_weight is None else bn_weight.to(acc) * invstd
            if need_db or need_dgamma or need_dbeta:
                sum_dy = dy.sum([d for d in range(dy.ndim) if d != 1], dtype=acc)
            on_weight = scale
            if is_narrow := dy.dtype == torch.float16:
                # dW' is dW / s, which may leave float16's range where dW does not. With invstd
                # in dy, which is how eval mode does it, dW' is dW / gamma.
                dy = (dy * invstd.reshape([1, -1] + [1] * (dy.ndim - 2))).to(dy.dtype)
                on_weight = torch.ones_like(invstd) if bn_weight is None else bn_weight.to(acc)
            # What the forward multiplied with: under autocast, the weight after its cast.
            used_weight = weight.to(x.dtype).to(acc)
            if need_dx or need_dw or need_dgamma:
                folded = weight.to(x.dtype)  # for its shape and layout, unless dx is wanted
                if need_dx:
                    folded = scale_weight(used_weight, on_weight, layout).to(x.dtype)
                dx, dfolded = _layer_backward(dy, x, folded, conv, need_dx, need_dw or need_dgamma)
            if need_dw:
                dw = scale_weight(dfolded.to(acc), on_weight, layout).to(weight.dtype)
            if need_db:
                db = (scale * sum_dy).to(bias.dtype)
            if need_dgamma:
                shift = -running_mean.to(acc)
                if bias is not None:
                    # First, because bias and mean may be large and nearly equal.
                    shift = bias.to(x.dtype).to(acc) + shift
                inner = channel_inner_product(dfolded.to(acc), used_weight, layout)
                offset = shift * sum_dy
                dgamma = inner + invstd * offset if is_narrow else invstd * (inner + offset)
                dgamma = dgamma.to(bn_weight.dtype)
            if need_dbeta:
                dbeta = sum_dy.to(ctx.bn_bias_dtype)
        return dx, dw, db, dgamma, dbeta, None, None, None, None


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast makes layers compute in here; None if it leaves ``x`` as it is."""
    device_type = x.device.type
    if not _is_autocast_enabled(device_type) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device_type)


def _cast_input(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None
) -> Tensor:
    """``x`` in the dtype that the layer computes in: ``dtype``, or what autocast makes of it.

    Raises:
        RuntimeError: dtypes differ and no autocast is there to cast, as the layer would. Fake
            tensors do not always tell, so that tracing may have let such a call through.
    """
    if _is_autocast_enabled(x.device.type):
        dtype = dtype or _autocast_dtype(x)
        return x if dtype is None else x.to(dtype)
    for tensor in (weight, bias):
        if tensor is not None and tensor.dtype != x.dtype:
            raise RuntimeError(
                f"expected input, weight and bias of a layer to have the same dtype, but got "
                f"{x.dtype} and {tensor.dtype}"
            )
    return x


def _same_padding(
    x: Tensor, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """``padding="same"`` as numbers, with ``x`` padded first where left and right differ.

    This is what ``aten::conv2d.padding`` does: an even kernel pads one more on the right.
    """
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(t % 2 for t in total):
        extra = [amount for t in reversed(total) for amount in (0, t % 2)]
        x = F.pad(x, extra)
    return x, tuple(t // 2 for t in total)


def conv_bn_eval(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    transposed: bool,
    output_padding: tuple[int, ...],
    groups: int,
    *,
    dtype: torch.dtype | None = None,
    function: type[ConvBNEval] = ConvBNEval,
) -> Tensor:
    """Batched 1-d, 2-d or 3-d convolution, plain or transposed, then eval-mode batch norm.

    ``x`` [N, C_in, *spatial]; ``weight`` as in :mod:`convbn_inductor_pass.fold`; all else of
    channel size is [C_out] or None. Returns [N, C_out, *spatial'] in the dtype that
    ``F.batch_norm(conv(x), ..., training=False)`` returns, autocast included, with its bits.
    ``dtype`` is what the convolution computes in, if that is not what autocast makes of
    ``F.conv2d`` (it leaves ``torch.convolution`` alone).
    ``function`` may replace the forward, never the gradient.
    """
    x = _cast_input(x, weight, bias, dtype)
    if isinstance(padding, str):
        if padding == "same":
            x, padding = _same_padding(x, tuple(weight.shape[2:]), dilation)
        else:  # "valid"
            padding = (0,) * len(stride)
    conv = Conv(stride, padding, dilation, transposed, output_padding, groups)
    return function.apply(x, weight, bias, bn_weight, bn_bias, running_mean, running_var, eps, conv)


def linear_bn_eval(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    *,
    dtype: torch.dtype | None = None,
    function: type[ConvBNEval] = ConvBNEval,
) -> Tensor:
    """Linear layer, its result viewed as [rows, C_out], then eval-mode batch norm over the rows.

    ``x`` [..., C_in] with at least two dimensions, ``weight`` [C_out, C_in]; returns
    [prod(...), C_out]. ``dtype`` is as for :func:`conv_bn_eval`.
    """
    x = _cast_input(x, weight, bias, dtype)
    return function.apply(x, weight, bias, bn_weight, bn_bias, running_mean, running_var, eps, None)
