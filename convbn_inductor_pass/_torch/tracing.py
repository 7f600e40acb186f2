"""Get the graphs that ``torch.compile`` would see, on fake tensors and without compiling."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from . import compat

__all__ = ["copy_graph_module", "graph_modules", "trace"]


def trace(
    fn: Callable[..., Any],
    inputs: tuple[Any, ...],
    on_graph: Callable[[fx.GraphModule, list[Any]], None],
    *,
    dynamic: bool | None = None,
) -> Any:
    """Trace ``fn`` with Dynamo on fake tensors; ``on_graph`` gets every graph.

    Returns what ``fn`` returns, as fake tensors. Graph breaks give several graphs. Leaves no
    compiled code behind for ``fn`` itself, and counters as they were.
    """

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        on_graph(gm, example_inputs)
        return gm.forward

    def call(model: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        return model(*arguments)

    # A code object of its own, so that the entries in Dynamo's cache go with it.
    fresh = types.FunctionType(
        call.__code__.replace(co_name="explained"), call.__globals__, "explained"
    )
    fake_mode = next(
        (t.fake_mode for t in pytree.tree_leaves(inputs) if isinstance(t, compat.FakeTensor)),
        None,
    ) or compat.FakeTensorMode(allow_non_fake_inputs=True)
    fake_mode.allow_non_fake_inputs = True
    fakes = pytree.tree_map(
        lambda v: (
            fake_mode.from_tensor(v, static_shapes=True)
            if isinstance(v, Tensor) and not isinstance(v, compat.FakeTensor)
            else v
        ),
        inputs,
    )
    # Sizes that differ from an earlier trace's are no sign that they vary in the user's model.
    static = {} if dynamic is not None else {"automatic_dynamic_shapes": False}
    with fake_mode, compat.counters_kept(), compat.dynamo_config.patch(static):
        return torch.compile(fresh, backend=backend, dynamic=dynamic)(fn, fakes)


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """Copy of a graph module and of the graph modules in it; parameters are shared."""
    graph = fx.Graph()
    graph._codegen = copy.copy(gm.graph._codegen)
    copies: dict[fx.Node, fx.Node] = {}
    output: Any = graph.graph_copy(gm.graph, copies, return_output_node=True)
    for node, node_copy in copies.items():
        compat.copy_dynamo_source(node, node_copy)
    if output is not None:
        value, old_node = output
        graph.output(value).meta = dict(old_node.meta)
    new = compat.lazy_graph_module(gm, graph)
    compat.copy_dynamo_source(gm, new)
    new.meta = dict(gm.meta)
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule):
            setattr(new, name, copy_graph_module(child))
    return new


def graph_modules(gm: fx.GraphModule) -> list[fx.GraphModule]:
    """The graph module and those inside it (bodies of higher-order operators), inner ones first."""
    inside = [m for m in gm.modules() if isinstance(m, fx.GraphModule)]
    return inside[::-1]
