"""A layer and an eval-mode batch norm that save one activation between them: the layer's input.

Before:  ``c = layer(x, W, b)``;  ``y = gamma * (c - mean) * invstd + beta``;  saves ``x`` and ``c``
After:   the same two calls, and the same bits;                               saves ``x``

with ``invstd = (running_var + eps) ** -0.5`` and ``A = gamma * invstd``, per channel. With ``g``
the gradient of ``y`` and ``<,>`` the inner product per output channel, the gradients are

    dc = A * g                                     dbeta = sum of g over all but channels
    dx, dW' = the layer's, from g and A * W        dgamma = invstd * (<dW', W> + (b - mean) * dbeta)
    dW = A * dW'                                   db = A * dbeta

``<dW', W>`` equals the sum of ``g * layer(x, W)``: what eval mode reads the saved layer output for
comes out of the weight gradient that is computed anyway. Nothing is divided by gamma.

Both calls stay nodes of the graph, joined by a true ``c``, so that hooks, other uses and whoever
stores ``c`` see what they see in eval mode. The batch norm's node saves no activation: it holds
the layer's node, reads what that one saved, computes the gradients of both, sends ``dc`` down and
leaves the layer's at its node. That one takes them if the gradient that arrives is that very
``dc``. If it is another one (``c`` has another use, a hook changed it), it computes its own.

Numerics. Everything of channel size, and sums over activations, are float32 for half-precision
inputs (float64 for float64); each gradient is rounded once to its parameter's dtype. The scaled
weight is recomputed in each backward. The errors of dx, dW and dbeta are eval mode's. dgamma is as
accurate as the weight gradient; like eval mode's it cancels where the mean of ``c`` is far larger
than its deviation. ``half`` keeps float16 gradients in range.

Declines: no forward-mode rule and no vmap rule, for which callers run layer and batch norm as
written.

Source: "Efficient ConvBN Blocks for Transfer Learning and Beyond", arXiv 2305.11624, section 3; the
formula for dgamma follows from its equation for the folded weight.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch import eager as torch_eager
from ..graph.layout import Layout, channel_inner_product, scale_weight
from .half import gradient_scale

__all__ = ["BatchNorm", "Conv", "batch_norm", "fold_affine", "layer", "layer_before"]

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


def layer(x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv | None) -> Tensor:
    """Batched convolution, plain or transposed, or linear layer. Twice differentiable.

    It computes in the dtype of ``x``; parameters may have a wider one, as under autocast, and get
    their gradients in it.

    Args:
        x: [N, C_in, *spatial]; for a linear layer [..., C_in] of at least two dimensions.
        weight: laid out as in :mod:`convbn_inductor_pass.graph.layout`.
        bias: [C_out].
        conv: how the convolution goes; None for a linear layer.
    """
    return _apply_layer(x, weight, bias, conv)


def layer_before(c: Tensor) -> Any:
    """The graph node of :func:`layer` whose unmodified output ``c`` is; None if it is not.

    It has the layer's ``conv``, ``channels``, and ``input`` and ``weight`` as weak references.
    The output of a linear layer may be viewed as [rows, C_out].
    """
    node: Any = c.grad_fn
    if node is None or c._version:
        return None
    if c.ndim == 2 and type(node).__name__ in _VIEWS:
        node = node.next_functions[0][0]
        if not _is_layer(node) or node.conv is not None or c.shape[1] != node.channels:
            return None
    return node if _is_layer(node) else None


def batch_norm(c: Tensor, bn: BatchNorm) -> Tensor:
    """Batch norm in eval mode of a ``c`` that is not saved. Twice differentiable.

    ``c`` [N, C, ...] has a :func:`layer_before`, or ``bn.weight`` requires no gradient. The weight
    of that layer must be there in the backward of the batch norm already.
    """
    node = layer_before(c)
    if node is None and bn.weight is not None and bn.weight.requires_grad:
        raise ValueError("the gradient of a batch norm's weight comes from the layer before it")
    return _apply_batch_norm(c, *bn, node)


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


_VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")
_Saved = tuple[Tensor, Tensor, Tensor | None]


@dataclasses.dataclass(eq=False)
class _HandedOver:
    """What the batch norm's backward leaves at the node of its layer, in one backward pass.

    Saved tensors are handed on, too: under checkpointing each may be unpacked only once a pass.
    """

    dc: Tensor
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None]
    saved: _Saved

    def __post_init__(self) -> None:
        self.version = self.dc._version
        self.backward_pass = torch_eager.backward_pass()

    def is_for(self, g: Tensor) -> bool:
        """Whether ``g`` is ``dc`` as it was sent, or a view of it with the same elements.

        Memory cannot have been reused, because ``dc`` is held here.
        """
        if g is not self.dc:
            key = torch_eager.storage_key(g)
            if key is None or key != torch_eager.storage_key(self.dc):
                return False
            if g.numel() != self.dc.numel() or not (g.is_contiguous() and self.dc.is_contiguous()):
                return False
        return g._version == self.version


class _Layer(torch.autograd.Function):
    conv: Conv | None
    channels: int
    handed_over: _HandedOver | None

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.set_materialize_grads(False)
        ctx.conv, ctx.handed_over = conv, None
        ctx.input, ctx.weight = weakref.ref(x), weakref.ref(weight)
        w, b = _to(weight, x.dtype), None if bias is None else _to(bias, x.dtype)
        if conv is None:
            c: Tensor = torch_eager.call_below(F.linear, x, w, b)
        else:
            c = torch_eager.call_below(torch.convolution, x, w, b, *conv)
        ctx.channels = c.shape[-1 if conv is None else 1]
        return c

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        left: _HandedOver | None = ctx.handed_over
        ctx.handed_over = None
        if left is not None and left.backward_pass != torch_eager.backward_pass():
            left = None
        if g is None:
            return None, None, None, None
        x, weight, bias = ctx.saved_tensors if left is None else left.saved
        need_dx, need_dw, need_db, _ = ctx.needs_input_grad
        if left is not None and left.is_for(g):
            return (*left.gradients, None)
        needs = (need_dx, need_dw, need_db)
        dx, dw, db = torch_eager.call_below(_layer_backward, g, x, weight, ctx.conv, needs)
        dw = None if dw is None else _to(dw, weight.dtype)
        return dx, dw, db if db is None or bias is None else _to(db, bias.dtype), None


def _is_layer(node: Any) -> bool:
    return getattr(type(node), "_forward_cls", None) is _Layer


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, c: Tensor, *bn_and_node: Any) -> Tensor:
        weight, bias, mean, var, eps, node = bn_and_node
        ctx.save_for_backward(weight, mean, var)
        ctx.eps, ctx.node, ctx.dtype = eps, node, c.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        cudnn = torch.backends.cudnn.enabled
        return torch_eager.call_below(
            torch.batch_norm, c, weight, bias, mean, var, False, 0.0, eps, cudnn
        )

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return torch_eager.call_below(_norm_backward, ctx, g)


def _norm_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    gamma, mean, var = ctx.saved_tensors
    need_dc, need_dgamma, need_dbeta = ctx.needs_input_grad[:3]
    acc = _accumulation_dtype(g.dtype)
    invstd, scale = _invstd_and_scale(gamma, var, ctx.eps, acc)
    shape = [1, -1] + [1] * (g.ndim - 2)
    dc = _to(g * scale.reshape(shape), ctx.dtype) if need_dc else None
    if not need_dgamma:
        dbeta = _to(_sum(g, acc), ctx.bias_dtype) if need_dbeta else None
        return dc, None, dbeta, None, None, None, None
    node = ctx.node
    saved = x, weight, bias = node.saved_tensors
    layout = _layout(node.conv)
    need_dx, need_dw, need_db, _ = node.needs_input_grad
    on_weight, t, scaled = scale, None, g
    if g.dtype == torch.float16:
        t = gradient_scale(g, scale)
        on_weight, scaled = scale / t, g * t.to(g.dtype).reshape(shape)
    wide = g.dtype == acc  # then the layer's own kernel may sum
    # What the forward multiplied with: under autocast, the weight after its cast.
    used = folded = _to(weight, x.dtype)
    if need_dx:  # else only its shape and layout are read
        folded = _to(scale_weight(_to(used, acc), on_weight, layout), x.dtype)
    needs = (need_dx, True, wide)
    dx, dfolded, sum_g = _layer_backward(scaled, x, folded, node.conv, needs)
    dfolded, sum_g = (dfolded, sum_g) if wide else (dfolded.to(acc), _sum(g, acc))
    inner = channel_inner_product(dfolded, _to(used, acc), layout)
    inner = inner if t is None else inner / t
    centre = _centred_bias(None if bias is None else _to(bias, x.dtype), mean, acc)
    dgamma = _to(invstd * torch.addcmul(inner, centre, sum_g), gamma.dtype)
    if dc is not None:
        dw = _to(scale_weight(dfolded, on_weight, layout), weight.dtype) if need_dw else None
        db = _to(scale * sum_g, bias.dtype) if need_db else None
        node.handed_over = _HandedOver(dc, (dx, dw, db), saved)
    dbeta = _to(sum_g, ctx.bias_dtype) if need_dbeta else None
    return dc, dgamma, dbeta, None, None, None, None


# Function.apply without what it does for torch.func and for setup_context, on every call.
_apply_layer = super(torch.autograd.Function, _Layer).apply
_apply_batch_norm = super(torch.autograd.Function, _BatchNorm).apply


def _to(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)


def _layer_backward(
    g: Tensor, x: Tensor, weight: Tensor, conv: Conv | None, needs: tuple[bool, bool, bool]
) -> Any:
    """Gradients of input, weight and bias, in the dtype of ``x``; None where not needed."""
    need_dx, need_dw, need_db = needs
    if not any(needs):
        return None, None, None
    weight = _to(weight, x.dtype)
    if not (need_dx or need_dw):
        return (
            None,
            None,
            _sum(g.flatten(0, -2) if conv is None else g, _accumulation_dtype(g.dtype)),
        )
    if conv is None:
        g, rows = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = (g @ weight).reshape(x.shape) if need_dx else None
        return dx, g.t() @ rows if need_dw else None, g.sum(0) if need_db else None
    sizes = [g.shape[1]] if need_db else None
    return aten.convolution_backward.default(g, x, weight, sizes, *conv, needs)


def _sum(g: Tensor, dtype: torch.dtype) -> Tensor:
    return g.sum([d for d in range(g.ndim) if d != 1], dtype=dtype)


def _layout(conv: Conv | None) -> Layout:
    return Layout() if conv is None else Layout(conv.transposed, conv.groups)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _invstd_and_scale(
    gamma: Tensor | None, running_var: Tensor, eps: float, acc: torch.dtype
) -> tuple[Tensor, Tensor]:
    invstd = (_to(running_var, acc) + eps).rsqrt()
    return invstd, invstd if gamma is None else _to(gamma, acc) * invstd


def _centred_bias(bias: Tensor | None, mean: Tensor, acc: torch.dtype) -> Tensor:
    # Subtracted before anything else is done, because the two may be large and nearly equal.
    return -_to(mean, acc) if bias is None else _to(bias, acc) - _to(mean, acc)
