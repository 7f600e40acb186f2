"""A layer and an eval-mode batch norm that save one activation between them: the layer's input.

Before:  ``c = layer(x, W, b)``;  ``y = gamma * (c - mean) * invstd + beta``;  saves ``x`` and ``c``
After:   the same two calls, and the same bits;                               saves ``x``

with ``invstd = (running_var + eps) ** -0.5`` and ``A = gamma * invstd``, per channel. With ``g``
the gradient of ``y`` and ``<,>`` the inner product per output channel, the gradients are

    dc = A * g                                     dbeta = sum of g over all but channels
    dx, dW, db = the layer's, from dc              dgamma = invstd * (<dW', W> + (b - mean) * dbeta)
    dW' = the layer's weight gradient, from g, so that dW = A * dW'

``<dW', W>`` equals the sum of ``g * layer(x, W)``: what eval mode reads the saved layer output for
comes out of the weight gradient that is computed anyway. ``gradients`` has it without division.

Both calls stay nodes of the graph, joined by a true ``c``, so that hooks, other uses and whoever
stores ``c`` see what they see in eval mode. The batch norm's node saves no activation: it holds
the layer's node, reads what that one saved, computes the gradients of both, sends ``dc`` down and
leaves the layer's at its node. That one takes them if the gradient that arrives is that very
``dc``. If it is another one (``c`` has another use, a hook changed it), it computes its own.

Numerics. Everything of channel size, and sums over activations, are float32 for half-precision
inputs (float64 for float64); each gradient is rounded once to its parameter's dtype. The errors of
dx, dW and dbeta are eval mode's. dgamma is as accurate as the weight gradient; like eval mode's it
cancels where the mean of ``c`` is far larger than its deviation. ``half`` keeps float16 gradients
in range.

Declines: no forward-mode rule and no vmap rule, for which callers run layer and batch norm as
written.

Source: "Efficient ConvBN Blocks for Transfer Learning and Beyond", arXiv 2305.11624, section 3; the
formula for dgamma follows from its equation for the folded weight.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch import eager as torch_eager
from .gradients import (
    BatchNorm,
    Conv,
    accumulation_dtype,
    cast,
    centred_bias,
    invstd_and_scale,
    layer_backward,
    pair_backward,
    sum_positions,
)

__all__ = ["batch_norm", "layer", "layer_before"]


def layer(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv | None, save_input: bool = True
) -> Tensor:
    """Batched convolution, plain or transposed, or linear layer. Twice differentiable.

    It computes in the dtype of ``x``; parameters may have a wider one, as under autocast, and get
    their gradients in it.

    Args:
        x: [N, C_in, *spatial]; for a linear layer [..., C_in] of at least two dimensions.
        weight: laid out as in :mod:`convbn_inductor_pass.graph.layout`.
        bias: [C_out].
        conv: how the convolution goes; None for a linear layer.
        save_input: False saves the shape of ``x`` alone where ``weight`` requires no gradient. The
            weight of a batch norm after it may not require one then either.
    """
    c: Tensor = _apply_layer(x, weight, bias, conv, save_input or weight.requires_grad)
    return c if c.ndim == x.ndim else c.view(*x.shape[:-1], -1)


def layer_before(c: Tensor) -> Any:
    """The graph node of :func:`layer` whose unmodified output ``c`` is; None if it is not.

    It has the layer's ``conv``, ``channels``, ``has_input`` (whether that is saved), and ``input``
    and ``weight`` as weak references.
    The output of a linear layer may be viewed as [rows, C_out].
    """
    node: Any = c.grad_fn
    if node is None or c._version:
        return None
    while type(node).__name__ in _VIEWS:
        node = node.next_functions[0][0]
    if not _is_layer(node):
        return None
    is_viewed = node is not c.grad_fn
    return None if is_viewed and (node.conv or c.shape[-1] != node.channels) else node


def batch_norm(c: Tensor, bn: BatchNorm) -> Tensor:
    """Batch norm in eval mode of a ``c`` that is not saved. Twice differentiable.

    ``c`` [N, C, ...] has a :func:`layer_before` that saves its input, or ``bn.weight`` requires no
    gradient. That layer's weight must be there in the backward of the batch norm already.
    """
    node = None
    if bn.weight is not None and bn.weight.requires_grad:
        node = layer_before(c)
        if node is None or not node.has_input:
            raise ValueError(
                "the gradient of a batch norm's weight comes from the layer before it, which has "
                "to save its input"
            )
    return _apply_batch_norm(c, *bn, node)


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
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        conv: Conv | None,
        has_input: bool,
    ) -> Tensor:
        ctx.save_for_backward(x if has_input else None, weight, bias)
        ctx.set_materialize_grads(False)
        ctx.conv, ctx.handed_over, ctx.has_input, ctx.x_shape = conv, None, has_input, x.shape
        ctx.input, ctx.weight = weakref.ref(x), weakref.ref(weight)
        w, b = cast(weight, x.dtype), None if bias is None else cast(bias, x.dtype)
        if conv is None:
            c: Tensor = torch_eager.call_below(F.linear, x, w, b)
            # Rows seen in more dimensions; a view made in here could not be written to.
            c = c if c._base is None else c._base
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
            return None, None, None, None, None
        x, weight, bias = ctx.saved_tensors if left is None else left.saved
        need_dx, need_dw, need_db, *_ = ctx.needs_input_grad
        if left is not None and left.is_for(g):
            return (*left.gradients, None, None)
        x = x if ctx.has_input else ctx.x_shape
        needs = (need_dx, need_dw, need_db)
        dx, dw, db = torch_eager.call_below(layer_backward, g, x, weight, ctx.conv, needs)
        dw = None if dw is None else cast(dw, weight.dtype)
        db = db if db is None or bias is None else cast(db, bias.dtype)
        return dx, dw, db, None, None


def _is_layer(node: Any) -> bool:
    return getattr(type(node), "_forward_cls", None) is _Layer


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, c: Tensor, *bn_and_node: Any) -> Tensor:
        weight, bias, mean, var, eps, node = bn_and_node
        ctx.save_for_backward(weight, mean, var)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.node, ctx.dtype = eps, node, c.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        cudnn = torch.backends.cudnn.enabled
        return torch_eager.call_below(
            torch.batch_norm, c, weight, bias, mean, var, False, 0.0, eps, cudnn
        )

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 7
        return torch_eager.call_below(_norm_backward, ctx, g)


def _norm_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    gamma, mean, var = ctx.saved_tensors
    need_dc, need_dgamma, need_dbeta = ctx.needs_input_grad[:3]
    acc = accumulation_dtype(g.dtype)
    invstd, scale = invstd_and_scale(gamma, var, ctx.eps, acc)
    dc = None
    if need_dc:
        dc = cast(g * scale.reshape([1, -1] + [1] * (g.ndim - 2)), ctx.dtype)
    if not need_dgamma:
        dbeta = cast(sum_positions(g, acc), ctx.bias_dtype) if need_dbeta else None
        return dc, None, dbeta, None, None, None, None
    node = ctx.node
    if torch_eager.in_compiled_autograd():
        raise RuntimeError(
            "compiled autograd gives each node its own saved tensors only, and tune mode's batch "
            "norms read those of the layer: call convbn_inductor_pass.turn_off(model), and compile "
            "the model with convbn_inductor_pass.enable() instead"
        )
    saved = x, _, bias = node.saved_tensors
    found = pair_backward(g, dc, scale, (*saved, node.conv), node.needs_input_grad[:3])
    centre = centred_bias(None if bias is None else cast(bias, x.dtype), mean, acc)
    dgamma = cast(invstd * torch.addcmul(found.inner, centre, found.sum_g), gamma.dtype)
    if dc is not None:
        node.handed_over = _HandedOver(dc, found[:3], saved)
    dbeta = cast(found.sum_g, ctx.bias_dtype) if need_dbeta else None
    return dc, dgamma, dbeta, None, None, None, None


# Function.apply without what it does for torch.func and for setup_context, on every call.
_apply_layer = super(torch.autograd.Function, _Layer).apply
_apply_batch_norm = super(torch.autograd.Function, _BatchNorm).apply
