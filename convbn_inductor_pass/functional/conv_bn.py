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
from typing import Any, NamedTuple

import torch
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
    as rows [N, C_in]. ``version`` is the output's. With others' hooks, what is saved is ``shared``.
    """

    node: Any
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    version: int
    shared: Any = contextlib.nullcontext()

    @property
    def is_conv(self) -> bool:
        return type(self.node).__name__ == "ConvolutionBackward0"

    def gave(self, c: Tensor) -> bool:
        """Whether ``c`` is the unmodified output; of a linear layer, as it is or as [N, C_out]."""
        if c._version != self.version or node_of_layer(c) is not self.node:
            return False
        return c.grad_fn is self.node if self.is_conv else c.shape[-1] == self.weight.shape[0]


def layer(
    function: Callable[..., Tensor], *args: Any, **kwargs: Any
) -> tuple[Tensor, Layer | None]:
    """The output of a convolution or linear layer as written, and what :func:`batch_norm` needs.

    That is None if there is no autograd node that has it (a frozen linear layer's), no batch
    dimension, or a bias that differs by row.
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
    if node is None or input.ndim < weight.ndim or (bias is not None and bias.ndim != 1):
        return None
    used = getattr(node, _INPUT[type(node).__name__])
    return None if used is None else Layer(node, used, weight, bias, c._version)


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
    is_watched: Callable[[], bool],
) -> Tensor:
    """Batch norm in eval mode of a ``c`` [N, C, ...] that is not saved. Twice differentiable.

    ``layer`` gave ``c``; ``is_watched`` is asked in backward: whether someone may look at the
    gradient of ``c``.
    """
    operands = layer.input, layer.weight, layer.bias
    return _BatchNorm.apply(c, *operands, weight, bias, (mean, var, eps, layer, is_watched))


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, c: Tensor, *arguments: Any) -> Tensor:
        _, weight, bias, gamma, beta, others = arguments
        mean, var, eps, layer, is_watched = others
        ctx.eps, ctx.node, ctx.is_watched = eps, layer.node, is_watched
        ctx.is_conv, ctx.shared, ctx.found = layer.is_conv, layer.shared, False
        # A convolution's node has the weight, a linear layer's only if its input needs a gradient.
        ctx.save_for_backward(mean, var, gamma, bias, None if ctx.is_conv else weight)
        ctx.set_materialize_grads(False)
        # What F.batch_norm calls.
        cudnn = torch.backends.cudnn.enabled
        return torch.batch_norm(c, gamma, beta, mean, var, False, 0.0, eps, cudnn)

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
        if ctx.needs_input_grad[4]:
            with ctx.shared:
                x = getattr(node, _INPUT[type(node).__name__])
                weight = node._saved_weight if ctx.is_conv else weight.to(x.dtype)
            layer = x, weight, Conv(*_geometry(node)) if ctx.is_conv else None
        of_norm = mean, var, gamma, bias
        return *torch_eager.call_below(_gradients, ctx, g, of_norm, layer), None


def _next_functions(node: Any) -> Any:
    """Of a batch norm's node. From here, hooks of the layer's node can be reached."""
    node.found = True
    return super(_BatchNorm._backward_cls, node).next_functions


_BatchNorm._backward_cls.next_functions = property(_next_functions)


def _gradients(ctx: Any, g: Tensor, of_norm: Any, layer: Any) -> tuple[Tensor | None, ...]:
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
    if ctx.found or ctx.is_watched() or not torch_eager.will_run(ctx.node):
        dc, needs, need_bias = g * per_channel(scale, g), (False, False), False
    dx, dw, inner, sum_g = pair_backward(g, scale, layer, needs)
    db = scale * sum_g if need_bias else None
    # Subtracted before anything else is done, because the two may be large and nearly equal.
    centre = -mean.to(acc) if bias is None else bias.to(layer[0].dtype).to(acc) - mean.to(acc)
    dgamma = invstd * torch.addcmul(inner, centre, sum_g)
    return dc, dx, dw, db, dgamma, sum_g if need_beta else None
