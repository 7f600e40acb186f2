"""An eval-mode batch norm after a layer, without the layer's output saved.

Before:  ``c = layer(x, W, b)``;  ``y = gamma * (c - mean) * invstd + beta``;  saves ``x`` and ``c``
After:   the same two calls, and the same bits;                               saves ``x``

with ``invstd = (running_var + eps) ** -0.5`` and ``A = gamma * invstd``, per channel. With ``g``
the gradient of ``y`` and ``<,>`` the inner product per output channel, the gradients are

    dc = A * g                                     dbeta = sum of g over all but channels
    dx, dW, db = the layer's, from dc              dgamma = invstd * (<dW', W> + (b - mean) * dbeta)
    dW' = the layer's weight gradient, from g, so that dW = A * dW'

``<dW', W>`` is the sum of ``g * layer(x, W)``, for which eval mode reads the saved output.

The layer has autograd's own node. The batch norm's takes ``x``, ``W`` and ``b``, too: it reads what
the layer's node saved and gives all gradients, but none to ``c``, so that the layer's node has
nothing to compute. Only if someone may look at ``dc`` (``c`` is alive in backward or was used
elsewhere, or nodes were followed) it gives ``dc`` instead, and the layer's node computes its own.

Numerics (docs/numerics.md): everything of channel size, and sums over activations, are float32 or
wider; each gradient is rounded once to its parameter's dtype. dgamma is as accurate as dW.

Source: "Efficient ConvBN Blocks for Transfer Learning and Beyond", arXiv 2305.11624, section 3; the
formula for dgamma follows from its equation for the folded weight.
"""

import contextlib
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch import eager as torch_eager
from .gradients import Conv, pair_backward, per_channel, sum_positions
from .saved import shared_saves

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
    as rows [N, C_in]; to be read in ``reading``. ``state`` is that of output and operands then.
    """

    node: Any
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    state: tuple[Any, ...]
    reading: Callable[[], Any] = contextlib.nullcontext

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
    call: Callable[[], Tensor], x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Layer | None]:
    """The result of a call of a convolution or linear layer, and what :func:`batch_norm` needs.

    That is None if there is no autograd node that has it (a frozen linear layer's), no batch
    dimension, or a bias that differs by row or does not count writes.
    """
    if torch_eager.saved_tensors_hooks() is None:
        c = call()
        return c, _read(c, x, weight, bias)
    hooks, reading = shared_saves()
    with reading():
        with hooks:
            c = call()
        layer = _read(c, x, weight, bias)
    return c, None if layer is None else layer._replace(reading=reading)


def _read(c: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Layer | None:
    node = node_of_layer(c)
    has_rows = bias is not None and (bias.ndim != 1 or bias.is_inference())
    if node is None or x.ndim < weight.ndim or has_rows:
        return None
    used = getattr(node, _INPUT[type(node).__name__])
    return used if used is None else Layer(node, used, weight, bias, _state(c, used, weight, bias))


def node_of_layer(c: Tensor) -> Any:
    """The autograd node of the layer that gave ``c``, or what ``c`` is a view of; or None."""
    node: Any = c.grad_fn
    while type(node).__name__ in _OF_LINEAR:
        node = node.next_functions[0][0]
    return node if type(node).__name__ in _INPUT else None


def batch_norm(
    c: Tensor,
    layer: Layer,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    watch: Callable[[], tuple[bool, Sequence[Tensor]]],
) -> Tensor:
    """Batch norm in eval mode of a ``c`` [N, C, ...] that is not saved. Twice differentiable.

    ``weight`` is trained; ``layer`` gave ``c``. ``watch`` is asked in backward: whether ``c`` was
    used elsewhere, and what still exists of ``c`` and its views.
    """
    others = mean, var, eps, layer, watch
    y: Tensor = torch_eager.apply(_BatchNorm, c, *layer[1:4], weight, bias, others)
    return y


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, c: Tensor, *arguments: Any) -> Tensor:
        _, weight, bias, gamma, beta, others = arguments
        mean, var, eps, layer, watch = others
        ctx.eps, ctx.node, ctx.watch, ctx.state = eps, layer.node, watch, (c._version, c.dtype)
        ctx.is_conv, ctx.reading, ctx.found = layer.is_conv, layer.reading, False
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
                "compiled autograd cannot trace tune mode's batch norms: call "
                "convbn_inductor_pass.turn_off(model), and compile the model with enable() instead"
            )
        # Unpacked out here: checkpointing then runs the forward again, in a region.
        node, runs, layer = ctx.node, torch_eager.will_run(ctx.node), None
        *of_norm, weight = ctx.saved_tensors
        used, outputs = ctx.watch()
        c = next((o for o in outputs if _is_output(o, ctx)), None)
        if c is None:
            with ctx.reading() if runs else contextlib.nullcontext():
                x = getattr(node, _INPUT[type(node).__name__])
                if weight is None:
                    weight = node._saved_weight if ctx.is_conv else node._saved_mat2.t()
            layer = x, weight.to(x.dtype), Conv(*_geometry(node)) if ctx.is_conv else None
        arguments = ctx, g, of_norm, layer, used or bool(outputs) or ctx.found or not runs, c
        return *torch_eager.call_below(_gradients, *arguments), None


def _is_output(t: Tensor, ctx: Any) -> bool:
    """Whether it is the layer's output, or a view of it in autograd's graph, as it was."""
    node = t.grad_fn if ctx.is_conv else node_of_layer(t)
    return node is ctx.node and (t._version, t.dtype) == ctx.state


def _found(name: str) -> Any:
    """A member of a batch norm's node from which a gradient of c can be reached, or is seen."""

    def member(node: Any) -> Any:
        node.found = True
        return getattr(super(_BatchNorm._backward_cls, node), name)

    return property(member)


for _name in ("next_functions", "register_hook"):
    setattr(_BatchNorm._backward_cls, _name, _found(_name))


def _gradients(
    ctx: Any, g: Tensor, of_norm: Any, layer: Any, is_watched: bool, c: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of c, x, W, b, gamma and beta, those of parameters as wide as they were computed.

    If there is one of c, the layer's node makes those of x, W and b. That of gamma comes from ``c``
    if that exists: second-order gradients pass its hooks.
    """
    mean, var, gamma, bias = of_norm
    _, *needs, need_bias, _, need_beta, _ = ctx.needs_input_grad
    acc = torch.promote_types(g.dtype, torch.float32)
    invstd = (var.to(acc) + ctx.eps).rsqrt()
    scale = gamma * invstd
    dc = None
    if is_watched:
        dc, needs, need_bias = g * per_channel(scale, g), (False, False), False
    if c is not None:
        sum_g = sum_positions(g)
        inner = sum_positions(g * (c.reshape(g.shape) - per_channel(mean.to(acc), g)))
        return dc, None, None, None, invstd * inner, sum_g if need_beta else None
    dx, dw, inner, sum_g = pair_backward(g, scale, layer, needs)
    db = scale * sum_g if need_bias else None
    # Subtracted before anything else is done, because the two may be large and nearly equal.
    centre = -mean.to(acc) if bias is None else bias.to(layer[0].dtype).to(acc) - mean.to(acc)
    dgamma = invstd * torch.addcmul(inner, centre, sum_g)
    return dc, dx, dw, db, dgamma, sum_g if need_beta else None
