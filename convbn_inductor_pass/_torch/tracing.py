"""Get the graphs that ``torch.compile`` would see, on fake tensors and without compiling."""

import collections
import contextlib
import copy
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo import convert_frame
from torch._dynamo.eval_frame import DisableContext, _debug_get_cache_entry_list, reset_code
from torch._dynamo.exc import TorchRuntimeError, Unsupported, UserError
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from . import version

# Frames that the user has compiled, too, then have a limit of recompilations of their own.
_APART: Any = {"isolate_recompiles": True} if version >= "2.13" else {}

ValuesNeeded = (DataDependentOutputException, DynamicOutputShapeException)
ModelError = (TorchRuntimeError, Unsupported, UserError, TypeError)


def trace(
    fn: Callable[..., Any],
    inputs: tuple[Any, ...],
    on_graph: Callable[[fx.GraphModule, list[Any]], None],
    keywords: Mapping[str, Any] | None = None,
    *,
    dynamic: bool | None = None,
    on_call: Callable[[fx.GraphModule, tuple[Any, ...]], None] = lambda gm, args: None,
) -> Any:
    """Trace ``fn`` with Dynamo on fake tensors, and return what it returns, as fake tensors.

    ``on_graph`` gets every graph (several if it breaks), ``on_call`` a graph and its arguments for
    each call of one. Leaves no compiled code behind, and counters and modules as they were.

    Raises:
        ModelError: ``fn`` cannot be traced, or raises on these inputs.
        ValuesNeeded: its Python code asks for values of tensors, which fake ones do not have.
        ValueError: see :func:`unchanged`.
    """

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        on_graph(gm, example_inputs)

        def run(*args: Any) -> Any:
            on_call(gm, args)
            return gm.forward(*args)

        return run

    def call(model: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        return model(*arguments, **keywords)

    # A code object of its own, so that the entries in Dynamo's cache go with it.
    fresh = types.FunctionType(call.__code__.replace(co_name="explained"), call.__globals__)
    if not isinstance(getattr(fn, "dynamo_ctx", None), DisableContext):
        fn = getattr(fn, "_orig_mod", fn)  # else its backend compiles frames after graph breaks
    fakes = (t for t in pytree.tree_leaves((inputs, keywords)) if isinstance(t, FakeTensor))
    fake_mode = next((t.fake_mode for t in fakes), FakeTensorMode())

    def fake(t: Tensor) -> Tensor:
        return t if isinstance(t, FakeTensor) else fake_mode.from_tensor(t, static_shapes=True)

    fake_inputs = pytree.tree_map_only(Tensor, fake, (inputs, dict(keywords or {})))
    settings = {"recompile_limit": 1 << 20, "accumulated_recompile_limit": 1 << 20}
    if dynamic is None:
        # Sizes that differ from an earlier trace's are no sign that they vary in the user's model.
        settings["automatic_dynamic_shapes"] = False
    counted = mock.patch.dict(counters, {k: v.copy() for k, v in counters.items()})  # temporary
    real_allowed = mock.patch.object(fake_mode, "allow_non_fake_inputs", True)
    try:
        with unchanged(fn), real_allowed, fake_mode, counted, dynamo_config.patch(settings):
            compiled = torch.compile(fresh, backend=backend, dynamic=dynamic, **_APART)
            return compiled(fn, *fake_inputs)
    finally:
        _forget_code(backend)


def _forget_code(backend: Callable[..., Any]) -> None:
    """Drop what Dynamo has compiled with a backend; nothing calls it any more.

    In frames after graph breaks it would count for Dynamo's limit of recompilations. Only all of a
    code object's entries can be dropped: the user's stay if they have a limit of their own.
    """
    for code in [reference() for reference in convert_frame.input_codes.seen]:
        entries = [] if code is None else _debug_get_cache_entry_list(code)
        ours = [getattr(e.backend, "compiler_fn", e.backend) is backend for e in entries]
        if code is not None and any(ours) and (all(ours) or not _APART):
            reset_code(code)


@contextlib.contextmanager
def unchanged(fn: Callable[..., Any]) -> Iterator[None]:
    """At the end, undo what calling ``fn`` has changed in the modules that it calls.

    Attributes, gradients and elements of containers would be fake tensors. In place, fake tensors
    change real ones of one element, which they hold the values of.

    Raises:
        ValueError: one of the modules has more state than is seen here.
    """
    modules = [m for owner in _owners(fn) for m in owner.modules()]
    parameters = [p for m in modules for p in m._parameters.values() if p is not None]
    if any(map(is_lazy, parameters)):
        raise ValueError("a lazy module has no parameters yet: run the model once before")
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kinds = () if fsdp is None else (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
    if any(isinstance(m, kinds) for m in modules):
        raise ValueError("the model is sharded by FSDP: ask about it before it is")
    containers = _containers([m.__dict__ for m in modules])
    gradients = [(p, p.grad) for p in parameters]
    everything = (v for _, then in containers.values() for v in _values(then))
    tensors = [t for t in everything if type(t) in (Tensor, nn.Parameter) and not t.is_inference()]
    numbers = [(t, t._version, t.detach().clone()) for t in tensors if t.numel() == 1]
    try:
        yield
    finally:
        for now, then in containers.values():
            if _ids(now) != _ids(then):
                now.clear()
                (now.extend if isinstance(now, (list, collections.deque)) else now.update)(then)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for tensor, version, value in numbers:
                if tensor._version != version:
                    tensor.copy_(value)


def _owners(fn: Any) -> list[nn.Module]:
    """Modules that ``fn`` is, is a method of, or refers to."""
    found = [fn, getattr(fn, "__self__", None)]
    while isinstance(fn, functools.partial):
        found += [fn.func, *fn.args, *fn.keywords.values()]
        fn = fn.func
    if inspect.isfunction(fn):
        names = inspect.getclosurevars(fn)
        found += [*names.nonlocals.values(), *names.globals.values()]
    return [f for f in found if isinstance(f, nn.Module)]


_CONTAINERS = (list, set, dict, collections.deque, collections.OrderedDict, collections.defaultdict)


def _containers(pending: list[Any]) -> dict[int, tuple[Any, Any]]:
    """By id, the containers in ``pending`` and those inside, each with a copy as it is now."""
    found: dict[int, tuple[Any, Any]] = {}
    while pending:
        value = pending.pop()
        if type(value) in _CONTAINERS and id(value) not in found:
            found[id(value)] = value, value.copy()
            pending += _values(value)
    return found


def _values(container: Any) -> Any:
    return container.values() if isinstance(container, dict) else container


def _ids(container: Any) -> list[int]:
    return [*map(id, container), *map(id, _values(container))]


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """Copy of a graph module and of the graph modules in it; parameters are shared."""
    graph = copy.deepcopy(gm.graph)
    # Compiled when it is called: PyTorch's own efficient_conv_bn_eval puts a builtin function among
    # a node's arguments, which does not print as Python.
    with _use_lazy_graph_module(True):
        new = _make_graph_module(gm, graph)
    new.meta = dict(gm.meta)
    # These tell AOTAutograd that a graph is Dynamo's and which inputs are parameters. Without them
    # parameters count as activations, and the partitioner's choice differs.
    for old, made in zip((gm, *gm.graph.nodes), (new, *graph.nodes), strict=True):
        for name in ("_dynamo_source", "_param_name_to_source"):
            if hasattr(old, name):
                setattr(made, name, getattr(old, name))
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule):
            setattr(new, name, copy_graph_module(child))
    return new
