"""A layer and an eval-mode batch norm that save one activation between them: the layer's input.

Before:  ``c = layer(x, W, b)``;  ``y = gamma * (c - mean) * invstd + beta``;  saves ``x`` and ``c``
After:   the same two calls, and the same bits;                               saves ``x``

with ``invstd = (running_var + eps) ** -0.5`` and ``A = gamma * invstd``, per channel. With ``g``
the gradient of ``y`` and ``<,>`` the inner product per output channel, the gradients are

    dc = A * g                                     dbeta = sum of g over all but channels
    dx, dW, db = the layer's, from dc              dgamma = invstd * (<dW', W> + (b - mean) * dbeta)
    dW' = the layer's weight gradient, from g, so that dW = A * dW'

``<dW', W>`` is the sum of ``g * layer(x, W)``, for which eval mode reads the saved output.

Both calls stay nodes of the autograd graph, connected by a real ``c``. The batch norm's node saves
no activation: it reads what the layer's node saved, computes the gradients of both, and leaves the
layer's at the layer's node, which adds what it gets for other uses of ``c``. ``dc`` itself is
computed only if someone may look at it: if ``c`` is alive in backward or was used elsewhere, or if
someone has gone from node to node. Then the layer's node computes its gradients from that.

Numerics (docs/numerics.md): everything of channel size, and sums over activations, are float32 or
wider; each gradient is rounded once to its parameter's dtype. dgamma is as accurate as dW.

Source: "Efficient ConvBN Blocks for Transfer Learning and Beyond", arXiv 2305.11624, section 3; the
formula for dgamma follows from its equation for the folded weight.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch import eager as torch_eager
from .gradients import Conv, layer_backward, pair_backward, per_channel, sum_positions
from .saved import saves_as_autograd

_VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")
_geometry = operator.attrgetter(*(f"_saved_{name}" for name in Conv._fields))
_INPUT_OF_LINEAR = {"AddmmBackward0": "_saved_mat1", "MmBackward0": "_saved_self"}


def layer(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """The output of a convolution or linear layer as written, with a node of our own.

    The tensors that it used, after autocast and padding, are read from autograd's node. An output
    without a node, or with one of unknown type (a frozen linear layer's), is returned as it is, as
    is one without a batch dimension or with a bias that differs by row. Twice differentiable.
    """
    x, weight, bias = layer_tensors(*args, **kwargs)
    if x.ndim < weight.ndim or (bias is not None and bias.ndim != 1):
        return function(*args, **kwargs)
    if torch_eager.saved_tensors_hooks() is None:
        c = function(*args, **kwargs)
    else:
        # Autograd's node does not outlive this call: what it saves is nothing to others' hooks.
        with saves_as_autograd():
            c = function(*args, **kwargs)
    used, conv = _read(c)
    if used is None:
        return c
    rows = c if conv else c.view(-1, c.shape[-1])
    # In a list: an output that is an input, too, would be a view, which must not be written to.
    # ``data`` counts writes to it from here on.
    y: Tensor = _Layer.apply(used, weight, bias, conv, [rows.data])
    return y if y.ndim == c.ndim else y.view(c.shape)


def layer_tensors(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *_: Any, **__: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, weight and bias, of the arguments of any convolution or linear layer."""
    return input, weight, bias


def _read(c: Tensor) -> tuple[Tensor | None, Conv | None]:
    """Input and geometry of the layer whose output is ``c``; of a linear layer the input's rows."""
    node: Any = c.grad_fn
    if type(node).__name__ == "ConvolutionBackward0":
        return node._saved_input, Conv(*_geometry(node))
    if type(node).__name__ == "AddBackward0":  # a bias, where the input is not contiguous
        node = node.next_functions[0][0]
    node = _below_views(node)
    return getattr(node, _INPUT_OF_LINEAR.get(type(node).__name__, ""), None), None


def _below_views(node: Any) -> Any:
    while type(node).__name__ in _VIEWS:
        node = node.next_functions[0][0]
    return node


def layer_before(c: Tensor) -> Any:
    """The graph node of :func:`layer` whose unmodified output ``c`` is; None if it is not.

    The output of a linear layer, whose node has ``conv`` None, may be viewed as [rows, C_out].
    """
    node = _below_views(c.grad_fn)
    if getattr(type(node), "_forward_cls", None) is not _Layer or c._version:
        return None
    is_itself, is_rows = node is c.grad_fn, not node.conv and c.shape[-1] == node.channels
    return node if is_itself or is_rows else None


def batch_norm(
    c: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    is_watched: Callable[[], bool],
) -> Tensor:
    """Batch norm in eval mode of a ``c`` [N, C, ...] that is not saved. Twice differentiable.

    ``is_watched`` is asked in backward: whether someone may look at the gradient of ``c``. There
    must be a :func:`layer_before`, and its weight in the backward of the batch norm already.
    """
    return _BatchNorm.apply(c, mean, var, weight, bias, eps, layer_before(c), is_watched)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Any, conv: Any, output: Any) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.set_materialize_grads(False)
        (c,) = output
        ctx.conv, ctx.channels = conv, c.shape[1]
        # What the batch norm's backward leaves here, by backward pass: gradients, and the saved
        # tensors, since under checkpointing each may be unpacked only once a pass.
        ctx.handed_over = {}
        return c

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None, None, None), None
        gradients, saved = ctx.handed_over.pop(torch_eager.backward_pass(), nothing)
        if g is None:
            return (*gradients, None, None)
        x, weight, bias = saved or ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        dx, dw, db = torch_eager.call_below(layer_backward, g, x, weight, ctx.conv, needs)
        dw = None if dw is None else dw.to(weight.dtype)
        db = None if db is None or bias is None else db.to(bias.dtype)
        both = zip(gradients, (dx, dw, db), strict=True)
        return *(b if a is None else a + b for a, b in both), None, None


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, c: Tensor, *arguments: Any) -> Tensor:
        mean, var, weight, bias, ctx.eps, ctx.node, ctx.is_watched = arguments
        ctx.found = False
        ctx.save_for_backward(mean, var, weight)
        ctx.set_materialize_grads(False)
        ctx.dtype, ctx.bias_dtype = c.dtype, None if bias is None else bias.dtype
        return F.batch_norm(c, mean, var, weight, bias, eps=ctx.eps)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 8
        of_layer = None
        if ctx.needs_input_grad[3]:
            if torch_eager.in_compiled_autograd():
                raise RuntimeError(
                    "tune mode's batch norms cannot read the layer's saved tensors in compiled "
                    "autograd: call convbn_inductor_pass.turn_off(model), and compile the model "
                    "with convbn_inductor_pass.enable() instead"
                )
            of_layer = ctx.node.saved_tensors
        # Unpacked out here: checkpointing then runs the forward again, in a region.
        arguments = (ctx, g, ctx.saved_tensors, of_layer)
        dc, dgamma, dbeta = torch_eager.call_below(_norm_backward, *arguments)
        return dc, None, None, dgamma, dbeta, None, None, None


def _next_functions(node: Any) -> Any:
    """Of a batch norm's node. From here, hooks of the layer's node can be reached."""
    node.found = True
    return super(_BatchNorm._backward_cls, node).next_functions


_BatchNorm._backward_cls.next_functions = property(_next_functions)


def _norm_backward(ctx: Any, g: Tensor, saved: Any, of_layer: Any) -> tuple[Tensor | None, ...]:
    """Gradients of the batch norm's input, weight and bias; the layer's are left at its node."""
    mean, var, gamma = saved
    need_dc, need_dbeta, node = ctx.needs_input_grad[0], ctx.needs_input_grad[4], ctx.node
    acc = torch.promote_types(g.dtype, torch.float32)
    invstd = (var.to(acc) + ctx.eps).rsqrt()
    scale = gamma.to(acc) * invstd
    # What is left at a node that does not run would stay there.
    layer_runs = of_layer is not None and torch_eager.will_run(node)
    dc = None
    if need_dc and (ctx.found or ctx.is_watched() or not layer_runs):
        dc = (g * per_channel(scale, g)).to(ctx.dtype)
    if of_layer is None:
        return dc, None, sum_positions(g).to(ctx.bias_dtype) if need_dbeta else None
    x, _, bias = of_layer
    hands_over = need_dc and dc is None
    needs = node.needs_input_grad[:3] if hands_over else (False,) * 3
    *gradients, inner, sum_g = pair_backward(g, scale, (*of_layer, node.conv), needs)
    # Subtracted before anything else is done, because the two may be large and nearly equal.
    centre = (0 if bias is None else bias.to(x.dtype).to(acc)) - mean.to(acc)
    dgamma = (invstd * torch.addcmul(inner, centre, sum_g)).to(gamma.dtype)
    if layer_runs:
        node.handed_over[torch_eager.backward_pass()] = gradients, of_layer
    return dc, dgamma, sum_g.to(ctx.bias_dtype) if need_dbeta else None
