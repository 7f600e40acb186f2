"""An eval-mode batch norm after a layer, without the layer's output saved.

Before:  ``c = layer(x, W, b)``;  ``y = gamma * (c - mean) * invstd + beta``;  saves ``x`` and ``c``
After:   the same two calls, and the same bits;                               saves ``x``

with ``invstd = (running_var + eps) ** -0.5`` and ``A = gamma * invstd``, per channel. With ``g``
the gradient of ``y`` and ``<,>`` the inner product per output channel, the gradients are

    dc = A * g                                     dbeta = sum of g over all but channels
    dx, dW, db = the layer's, from dc              dgamma = invstd * (<dW', W> + (b - mean) * dbeta)
    dW' = the layer's weight gradient, from g, so that dW = A * dW'

``<dW', W>`` is the sum of ``g * layer(x, W)``, for which eval mode reads the saved output.

The layer runs as written, with autograd's own node. The batch norm's node takes ``x``, ``W`` and
``b``, too: it reads what the layer's node saved and gives all gradients, but none to ``c``, so that
the layer's node has nothing to compute. Only if someone may look at ``dc`` (if ``c`` is alive in
backward or was used elsewhere, or someone has gone from node to node) it gives ``dc`` instead, from
which the layer's node computes its own.

Numerics (docs/numerics.md): everything of channel size, and sums over activations, are float32 or
wider; each gradient is rounded once to its parameter's dtype. dgamma is as accurate as dW.

Source: "Efficient ConvBN Blocks for Transfer Learning and Beyond", arXiv 2305.11624, section 3; the
formula for dgamma follows from its equation for the folded weight.
"""

import contextlib
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch import eager as torch_eager
from .gradients import Conv, pair_backward, per_channel, sum_positions
from .saved import SharedSaves

# After a linear layer of more than two dimensions; its bias is added where its input has gaps.
_OF_LINEAR = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "AddBackward0")
_geometry = operator.attrgetter(*(f"_saved_{name}" for name in Conv._fields))
# Where an autograd node has the layer's input.
_INPUT = {
    "ConvolutionBackward0": "_saved_input",
    "AddmmBackward0": "_saved_mat1",
    "MmBackward0": "_saved_self",
}


class Layer(NamedTuple):
    """A call of a convolution or linear layer, for the batch norm after it.

    ``node`` is autograd's, ``input`` what it saved: after autocast, padding, and of a linear layer
    as rows [N, C_in]. ``state`` is that of output and operands at the call. Under others' hooks,
    what is saved is ``shared``.
    """

    node: Any
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    state: tuple[Any, ...]
    shared: Any = contextlib.nullcontext()

    @property
    def is_conv(self) -> bool:
        return type(self.node).__name__ == "ConvolutionBackward0"

    def gave(self, c: Tensor) -> bool:
        """Whether ``c`` is the output, or of a linear layer rows of it [N, C_out]."""
        if self.is_conv:
            return c.grad_fn is self.node
        return node_of_layer(c) is self.node and c.shape[-1] == self.weight.shape[0]

    def is_unchanged(self, c: Tensor) -> bool:
        """Whether output, weight and bias were not written to, nor ``requires_grad`` set, since."""
        return _state(c, self.input, self.weight, self.bias) == self.state


def _state(c: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    of_bias = () if bias is None else (bias._version, bias.requires_grad)
    return c._version, input.requires_grad, weight._version, weight.requires_grad, *of_bias


def layer(
    function: Callable[..., Tensor], *args: Any, **kwargs: Any
) -> tuple[Tensor, Layer | None]:
    """The output of a convolution or linear layer as written, and what :func:`batch_norm` needs.

    That is None if there is no autograd node that has it (a frozen linear layer's), no batch
    dimension, or a bias that differs by row or does not count writes.
    """
    if torch_eager.saved_tensors_hooks() is None:
        c = function(*args, **kwargs)
        return c, _read(c, *args, **kwargs)
    with (shared := SharedSaves()):
        with shared.hooks():
            c = function(*args, **kwargs)
        layer = _read(c, *args, **kwargs)
    return c, None if layer is None else layer._replace(shared=shared)


def _read(
    c: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None, *_: Any, **__: Any
) -> Layer | None:
    node = node_of_layer(c)
    if node is None or input.ndim < weight.ndim:
        return None
    if bias is not None and (bias.ndim != 1 or bias.is_inference()):
        return None
    used = getattr(node, _INPUT[type(node).__name__])
    if used is None:
        return None
    return Layer(node, used, weight, bias, _state(c, used, weight, bias))


def node_of_layer(c: Tensor) -> Any:
    """The autograd node of the layer that gave ``c``, or what ``c`` is a view of; or None."""
    node: Any = c.grad_fn
    while type(node).__name__ in _OF_LINEAR:
        node = node.next_functions[0][0]
    return node if type(node).__name__ in _INPUT else None


class Watch(Protocol):
    """What is known of the output of a layer, of which backward takes no gradient otherwise."""

    def is_watched(self) -> bool:
        """Whether someone may look at the gradient."""

    def output(self) -> Tensor | None:
        """The output if it still exists, of a linear layer in any shape [..., C_out]."""


def batch_norm(
    c: Tensor,
    layer: Layer,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    watch: Watch,
) -> Tensor:
    """Batch norm in eval mode of a ``c`` [N, C, ...] that is not saved. Twice differentiable.

    ``layer`` gave ``c``; ``watch`` is asked in backward.
    """
    operands = layer.input, layer.weight, layer.bias
    return _BatchNorm.apply(c, *operands, weight, bias, (mean, var, eps, layer, watch))


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, c: Tensor, *arguments: Any) -> Tensor:
        _, weight, bias, gamma, beta, others = arguments
        mean, var, eps, layer, watch = others
        ctx.eps, ctx.node, ctx.watch, ctx.version = eps, layer.node, watch, c._version
        ctx.is_conv, ctx.shared, ctx.found = layer.is_conv, layer.shared, False
        # A linear layer's node has the weight only if its input needs a gradient.
        has_weight = layer.is_conv or layer.input.requires_grad
        ctx.save_for_backward(mean, var, gamma, bias, None if has_weight else weight)
        ctx.set_materialize_grads(False)
        return F.batch_norm(c, mean, var, gamma, beta, eps=eps)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 7
        if torch_eager.in_compiled_autograd():
            raise RuntimeError(
                "tune mode's batch norms cannot read the layer's saved tensors in compiled "
                "autograd: call convbn_inductor_pass.turn_off(model), and compile the model "
                "with convbn_inductor_pass.enable() instead"
            )
        # Unpacked out here: checkpointing then runs the forward again, in a region.
        node, layer = ctx.node, None
        mean, var, gamma, bias, weight = ctx.saved_tensors
        runs = torch_eager.will_run(node)
        if ctx.needs_input_grad[4]:
            with ctx.shared if runs else contextlib.nullcontext():
                x = getattr(node, _INPUT[type(node).__name__])
                if ctx.is_conv:
                    weight = node._saved_weight
                else:
                    weight = node._saved_mat2.t() if weight is None else weight.to(x.dtype)
            layer = x, weight, Conv(*_geometry(node)) if ctx.is_conv else None
        watched = not runs or ctx.found or ctx.watch.is_watched()
        of_norm = mean, var, gamma, bias
        return *torch_eager.call_below(_gradients, ctx, g, of_norm, layer, watched), None


def _found(name: str) -> Any:
    """A member of a batch norm's node from which a gradient of c can be reached, or is seen."""

    def member(node: Any) -> Any:
        node.found = True
        return getattr(super(_BatchNorm._backward_cls, node), name)

    return property(member)


for _name in ("next_functions", "register_hook"):
    setattr(_BatchNorm._backward_cls, _name, _found(_name))


def _gradients(
    ctx: Any, g: Tensor, of_norm: Any, layer: Any, watched: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of c, x, W, b, gamma and beta, those of parameters as wide as they were computed.

    The layer's node makes those of x, W and b if there is one of c.
    """
    mean, var, gamma, bias = of_norm
    _, *needs, need_bias, _, need_beta, _ = ctx.needs_input_grad
    acc = torch.promote_types(g.dtype, torch.float32)
    invstd = (var.to(acc) + ctx.eps).rsqrt()
    scale = gamma * invstd
    if layer is None:
        dbeta = sum_positions(g) if need_beta else None
        return g * per_channel(scale, g), None, None, None, None, dbeta
    dc = None
    if watched and torch.is_grad_enabled() and (c := _seen(ctx, g)) is not None:
        # As in eval mode, so that second-order gradients pass c and its hooks.
        centred = c - per_channel(mean.to(acc), c)
        dgamma, sum_g = invstd * sum_positions(g * centred), sum_positions(g)
        dbeta = sum_g if need_beta else None
        return g * per_channel(scale, g), None, None, None, dgamma, dbeta
    if watched:
        dc, needs, need_bias = g * per_channel(scale, g), (False, False), False
    dx, dw, inner, sum_g = pair_backward(g, scale, layer, needs)
    db = scale * sum_g if need_bias else None
    # Subtracted before anything else is done, because the two may be large and nearly equal.
    centre = -mean.to(acc) if bias is None else bias.to(layer[0].dtype).to(acc) - mean.to(acc)
    dgamma = invstd * torch.addcmul(inner, centre, sum_g)
    return dc, dx, dw, db, dgamma, sum_g if need_beta else None


def _seen(ctx: Any, g: Tensor) -> Tensor | None:
    """The layer's output, shaped like ``g``, if it still exists and was not written to."""
    c = ctx.watch.output()
    return c.reshape(g.shape) if c is not None and c._version == ctx.version else None
