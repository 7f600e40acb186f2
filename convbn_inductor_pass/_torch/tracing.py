"""Get the graphs that ``torch.compile`` would see, on fake tensors and without compiling."""

import contextlib
import copy
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import TorchRuntimeError, Unsupported, UserError
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module
from torch.utils import _pytree as pytree

ValuesNeeded = (DataDependentOutputException, DynamicOutputShapeException)
ModelError = (TorchRuntimeError, Unsupported, UserError, TypeError)


def trace(
    fn: Callable[..., Any],
    inputs: tuple[Any, ...],
    on_graph: Callable[[fx.GraphModule, list[Any]], None],
    keywords: Mapping[str, Any] | None = None,
    *,
    dynamic: bool | None = None,
) -> Any:
    """Trace ``fn`` with Dynamo on fake tensors; ``on_graph`` gets every graph.

    Returns what ``fn`` returns, as fake tensors. Graph breaks give several graphs. Leaves no
    compiled code behind for ``fn`` itself, and leaves counters and a module as they were.

    Raises:
        ModelError: ``fn`` cannot be traced, or raises on these inputs.
        ValuesNeeded: its Python code asks for values of tensors, which fake ones do not have.
    """

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        on_graph(gm, example_inputs)
        return gm.forward

    def call(model: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        return model(*arguments, **keywords)

    # A code object of its own, so that the entries in Dynamo's cache go with it.
    fresh = types.FunctionType(call.__code__.replace(co_name="explained"), call.__globals__)
    fakes = (t for t in pytree.tree_leaves((inputs, keywords)) if isinstance(t, FakeTensor))
    fake_mode = next((t.fake_mode for t in fakes), FakeTensorMode())
    fake_mode.allow_non_fake_inputs = True

    def fake(value: Any) -> Any:
        is_real = isinstance(value, Tensor) and not isinstance(value, FakeTensor)
        return fake_mode.from_tensor(value, static_shapes=True) if is_real else value

    fake_inputs = pytree.tree_map(fake, (inputs, dict(keywords or {})))
    # Sizes that differ from an earlier trace's are no sign that they vary in the user's model.
    static = {} if dynamic is not None else {"automatic_dynamic_shapes": False}
    counted = mock.patch.dict(counters, {k: v.copy() for k, v in counters.items()})  # temporary
    with unchanged(fn), fake_mode, counted, dynamo_config.patch(static):
        return torch.compile(fresh, backend=backend, dynamic=dynamic)(fn, *fake_inputs)


@contextlib.contextmanager
def unchanged(fn: Callable[..., Any]) -> Iterator[None]:
    """At the end, undo what calling ``fn``, a module or its method, has changed in the module.

    Attributes would be fake tensors. In place, fake tensors change real ones of one element, which
    they hold the values of, such as ``num_batches_tracked``.
    """
    owner = getattr(fn, "__self__", fn)
    modules = owner.modules() if isinstance(owner, nn.Module) else ()
    attributes: list[Any] = [d for m in modules for d in (m.__dict__, m._parameters, m._buffers)]
    before = [d.copy() for d in attributes]
    everything: list[Any] = [value for d in before for value in d.values()]
    tensors = [t for t in everything if type(t) in (Tensor, nn.Parameter)]
    numbers = [t for t in tensors if t.numel() == 1 and not t.is_inference()]
    values = [(t, t._version, t.detach().clone()) for t in numbers]
    try:
        yield
    finally:
        for now, then in zip(attributes, before, strict=True):
            for name in now.keys() - then.keys():
                del now[name]
            now.update(then)
        with torch.no_grad():
            for tensor, version, value in values:
                if tensor._version != version:
                    tensor.copy_(value)


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """Copy of a graph module and of the graph modules in it; parameters are shared."""
    graph = copy.deepcopy(gm.graph)
    for node, node_copy in zip(gm.graph.nodes, graph.nodes, strict=True):
        _copy_dynamo_source(node, node_copy)
    # Compiled when it is called: PyTorch's own efficient_conv_bn_eval puts a builtin function among
    # a node's arguments, which does not print as Python.
    with _use_lazy_graph_module(True):
        new = _make_graph_module(gm, graph)
    _copy_dynamo_source(gm, new)
    new.meta = dict(gm.meta)
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule):
            setattr(new, name, copy_graph_module(child))
    return new


def graph_modules(gm: fx.GraphModule) -> list[fx.GraphModule]:
    """The graph module and those inside it (bodies of higher-order operators), inner ones first."""
    return [m for m in gm.modules() if isinstance(m, fx.GraphModule)][::-1]


def _copy_dynamo_source(old: Any, new: Any) -> None:
    """Copy what tells AOTAutograd that a graph is Dynamo's and which inputs are parameters.

    Without it parameters count as activations, and the partitioner's choice differs.
    """
    for name in ("_dynamo_source", "_param_name_to_source"):
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))
