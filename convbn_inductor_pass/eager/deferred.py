"""A convolution that waits to see whether a batch norm comes next.

Eager mode cannot look ahead: when ``conv(x)`` is called, the batch norm that might follow has not
been called yet. So the call is written down as a :class:`LayerCall` and its output is a
:class:`Deferred`, a tensor that knows its shape and dtype but has no elements.

* If an eval-mode batch norm takes it, and :func:`decide` finds that legal, both run as one folded
  convolution and the output of the convolution never exists.
* If anything else touches it, it is materialized: the convolution runs then, as written, under the
  grad mode, autocast and saved-tensor hooks of the call, and its output stands for it from then on.

There is no third case. Python functions of torch are caught in ``__torch_function__``, what gets
past them to the dispatcher in ``__torch_dispatch__``; a custom ``autograd.Function`` that takes a
``Deferred`` finds a graph to send its gradient to. Before arguments of the call are written to,
``region`` materializes it; a write that it cannot see (in an ``autograd.Function``, or by other
code than torch's) shows in version counters and raises.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._torch import eager as torch_eager
from ..codes import Code
from ..config import get_options
from ..functional import BatchNorm, conv_bn_eval
from .calls import BatchNormCall, Context, LayerCall, is_plain

__all__ = ["Deferred", "decide", "fuse", "live", "materialized"]


def decide(c: Any, bn: BatchNormCall) -> tuple[Code, str]:
    """Whether a batch norm is to be run as one with the layer that gave it ``c``, and a detail.

    In eager mode a batch norm whose weight is frozen saves its input, too, and is fused.
    """
    if bn.training or bn.running_mean is None or bn.running_var is None:
        return Code.BATCH_STATISTICS, ""
    if not isinstance(c, Deferred):
        return Code.NOT_AFTER_LAYER, ""
    if c.is_used:
        return c.used_as, ""
    call = c.call
    names = ("running_mean", "running_var", "weight", "bias")
    tensors = {name: t for name in names if (t := getattr(bn, name)) is not None}
    for name, tensor in tensors.items():
        if not is_plain(tensor) or tensor.device != call.input.device:
            return Code.UNSUPPORTED_TENSOR, f"{name} of the batch norm"
        mixed = call.dtype in (torch.float16, torch.bfloat16) and tensor.dtype == torch.float32
        if tensor.dtype != call.dtype and not mixed:
            return Code.UNSUPPORTED_DTYPE, f"{name} is {tensor.dtype}, the layer's {call.dtype}"
    if call.conv is None and len(call.shape) != 2:
        return Code.UNBATCHED, f"{len(call.shape)} dimensions with channels last"
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != (call.shape[1],):
            return Code.UNSUPPORTED_SHAPE, f"{name} has shape {tuple(tensor.shape)}"
    if Context.now(call.device_type) != call.context:
        return Code.REGION, ""
    if bn.running_mean.requires_grad or bn.running_var.requires_grad:
        return Code.STATISTICS_REQUIRE_GRAD, ""
    frozen = not call.weight.requires_grad and bn.weight is not None and bn.weight.requires_grad
    if frozen and call.context.grad_enabled and not get_options().fuse_frozen_layers:
        return Code.LAYER_FROZEN, ""
    return Code.FUSED, ""


def fuse(call: LayerCall, bn: BatchNormCall) -> Tensor:
    """Run layer and batch norm as one, where :func:`decide` gave ``FUSED``."""
    call.check_unmodified()
    norm = BatchNorm(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
    with torch_eager.torch_functions_off():
        x = call.input.to(call.dtype)
        return conv_bn_eval(x, call.weight, call.bias, norm, call.conv)


class _Defer(torch.autograd.Function):
    """Gives a :class:`Deferred` a place in the graph, for functions that torch does not show us."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: LayerCall
    ) -> Tensor:
        ctx.call = call
        return Deferred.empty(call)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        call: LayerCall = ctx.call
        call.check_unmodified()
        # Aliases, because the input may depend on the weight: through a layer that shares it.
        with torch_eager.torch_functions_off(), torch.enable_grad():
            operands = [None if t is None else t.view_as(t) for t in call.operands]
        needs = ctx.needs_input_grad[:3]
        wanted = [t for t, need in zip(operands, needs, strict=True) if need and t is not None]
        out = call.on(*operands).run()
        found = iter(torch.autograd.grad(out, wanted, dy, create_graph=torch.is_grad_enabled()))
        return (*(next(found) if need else None for need in needs), None)


class _Materialize(torch.autograd.Function):
    """The output of a :class:`Deferred` whose own graph goes on (see ``Deferred.materialize``)."""

    @staticmethod
    def forward(ctx: Any, deferred: Deferred) -> Tensor:
        return deferred.materialize_below_autograd().clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


class Deferred(Tensor):
    """The output of a layer that has not run. Looks like a tensor; see the module's docstring."""

    call: LayerCall
    used_as: Code
    _output: Tensor | None
    _without_graph: Tensor | None
    _graph: Any

    @staticmethod
    def empty(call: LayerCall) -> Deferred:
        new: Deferred = Tensor._make_wrapper_subclass(
            Deferred, call.shape, dtype=call.dtype, device=call.input.device
        )
        new.call, new.used_as = call, Code.LAYER_OUTPUT_USED
        new._output = new._without_graph = new._graph = None
        return new

    @staticmethod
    def of(call: LayerCall) -> Deferred:
        """A new deferred output, in the graph if the layer's would be."""
        with torch_eager.torch_functions_off():
            if call.needs_grad:
                new = _Defer.apply(*call.operands, call)
                new._graph = new.grad_fn
            else:
                new = Deferred.empty(call)
        call.live.append(weakref.ref(new))
        return new

    @property
    def is_used(self) -> bool:
        """Whether anything but a batch norm has seen the output."""
        return self._output is not None or self._without_graph is not None

    def materialize(self, why: Code = Code.LAYER_OUTPUT_USED) -> Tensor:
        """Run the layer, if it has not run: its output. Above autograd only."""
        with torch_eager.torch_functions_off():
            if self.grad_fn is not self._graph or self._version:
                # An autograd.Function wrote into it: its graph is this tensor's, not the layer's.
                return _Materialize.apply(self)
            if self._output is None:
                self.used_as = why
                self._output = self.call.run()
                self.call.on_use(why)
            return self._output

    def materialize_below_autograd(self) -> Tensor:
        """The same without a graph."""
        with torch_eager.torch_functions_off(), torch.no_grad():
            if self._output is not None:
                return self._output.detach()
            if self._without_graph is None:
                self._without_graph = self.call.run_below_autograd()
                self.call.on_use(self.used_as)
            return self._without_graph

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch_eager.torch_functions_off():
                return func(*args, **kwargs)
        if func in _SHAPE_LIKE and len(args) == 2 and not isinstance(args[0], Deferred):
            return _SHAPE_LIKE[func](args[0], args[1].shape)
        if func in _VIEWS and (rows := _as_rows(func, args, kwargs)) is not None:
            return rows
        return func(*materialized(args), **materialized(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        def elements(value: Any) -> Any:
            return value.materialize_below_autograd() if isinstance(value, Deferred) else value

        args, kwargs = pytree.tree_map(elements, (args, kwargs or {}))
        return func(*args, **kwargs)


# Questions that a tensor without elements can answer.
_ATTRIBUTES = ("shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_cuda")
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
    *(Tensor.size, Tensor.dim, Tensor.ndimension),
    *(Tensor.numel, Tensor.nelement, Tensor.element_size),
    *(Tensor.is_floating_point, Tensor.is_complex, torch.is_floating_point, torch.is_complex),
    *(Tensor.__len__, torch.numel),
}
# ``y.reshape_as(c)`` asks for the shape of ``c``.
_SHAPE_LIKE: dict[Any, Callable[..., Tensor]] = {
    Tensor.reshape_as: Tensor.reshape,
    Tensor.view_as: Tensor.view,
    Tensor.expand_as: Tensor.expand,
}
_VIEWS = {Tensor.flatten, torch.flatten, Tensor.reshape, torch.reshape, Tensor.view}


def _as_rows(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Deferred | None:
    """``linear(x)`` [..., C] viewed as [rows, C] is ``linear`` of the rows of ``x``."""
    c = args[0] if args else None
    if not isinstance(c, Deferred) or c.is_used or c.call.conv is not None:
        return None
    call = c.call
    if len(call.shape) < 3 or Context.now(call.device_type) != call.context:
        return None
    with torch_eager.torch_functions_off():
        on_meta = torch.empty(call.shape, device="meta")
        shape = func(on_meta, *args[1:], **kwargs).shape
        if len(shape) != 2 or shape[1] != call.shape[-1]:
            return None
        rows = call.input.reshape(-1, call.input.shape[-1])
        # Views as Tensor.view makes them exist for any layer output, which is contiguous.
        return Deferred.of(dataclasses.replace(call, input=rows, shape=tuple(shape)))


def materialized(value: Any) -> Any:
    """``value`` with the tensors that deferred outputs in it stand for."""
    if not any(isinstance(v, Deferred) for v in pytree.tree_leaves(value)):
        return value
    return pytree.tree_map(lambda v: v.materialize() if isinstance(v, Deferred) else v, value)


def live(references: list[weakref.ref[Deferred]]) -> Iterator[Deferred]:
    """Deferred outputs that somebody still holds and whose layer has not run."""
    for reference in references:
        deferred = reference()
        if deferred is not None and deferred._output is None:
            yield deferred
