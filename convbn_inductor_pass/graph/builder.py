"""Add calls to a graph in aten IR."""

import contextlib
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from .._torch import compat, inductor
from .._torch.eager import call_below
from .layers import tensor_of, value_of

aten = torch.ops.aten


class Builder:
    """Adds calls to a graph at its insertion point, with metadata.

    After a ``with`` statement, even one that failed, the graph is sorted, returns the replacements
    of its outputs, and has no unused nodes.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        tensors = (tensor for tensor in map(tensor_of, graph.nodes) if tensor is not None)
        self._mode = getattr(next(tensors, None), "fake_mode", contextlib.nullcontext())
        self.meta: dict[str, Any] = {}  # metadata of the calls to come, beside "val"
        self.replaced: dict[fx.Node, fx.Node] = {}
        self._sizes: dict[Any, fx.Node] = {}
        self._values: dict[Any, Any] = {}
        self._called = False

    def __enter__(self) -> "Builder":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._called:
            return
        for output in self.graph.find_nodes(op="output"):
            output.args = fx.map_arg(output.args, self.current)
        inductor.sort_graph(self.graph)
        for node in reversed(self.graph.nodes):
            if not (node.users or node.is_impure()):
                self.graph.erase_node(node)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Call ``target`` at the insertion point."""
        self._called = True
        args, kwargs = map_aggregate((args, kwargs), self._as_argument)
        node = self.graph.call_function(target, args, kwargs)
        node.meta = {**self.meta, "val": self._value(target, args, kwargs)}
        return node

    def current(self, node: fx.Node) -> fx.Node:
        """``node``, or what has replaced it."""
        return self.replaced.get(node, node)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let ``new`` be used for ``old``, also where later calls are given ``old``."""
        # The output's many arguments are looked through once for all, at the end.
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user.op != "output")
        self.replaced[old] = new

    def _value(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The fake result of a call. Of calls that are alike, all but the first are made up."""
        values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        like = compat.metadata_key((target, values))
        if like is not None and like in self._values:
            return compat.fake_copy(self._values[like])
        with self._mode, torch.no_grad():
            value = call_below(target, *values[0], **values[1])
        if like is not None:
            self._values[like] = value
        return value

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """``node`` in ``dtype``."""
        if value_of(node).dtype == dtype:
            return node
        return self.call(torch.ops.prims.convert_element_type.default, node, dtype)

    def dense(self, node: fx.Node, memory_format: Any = torch.contiguous_format) -> fx.Node:
        """``node`` in memory without gaps or repeats, in this format."""
        if value_of(node).is_contiguous(memory_format=memory_format):
            return node
        return self.call(aten.clone.default, node, memory_format=memory_format)

    def sizes(self, node: fx.Node) -> list[Any]:
        """The shape of ``node``, with a call for each size that is symbolic."""
        sizes = enumerate(value_of(node).shape)
        return [
            s if isinstance(s, int) else self.call(aten.sym_size.int, node, d) for d, s in sizes
        ]

    def _as_argument(self, value: Any) -> Any:
        """A node as what has replaced it, a symbolic size as the node that gives it."""
        if isinstance(value, fx.Node):
            return self.current(value)
        if not isinstance(value, torch.SymInt):
            return value
        sizes, expr = self._sizes, value.node.expr
        for node in self.graph.nodes if not sizes else ():
            if isinstance(node.meta.get("val"), torch.SymInt):
                sizes.setdefault(node.meta["val"].node.expr, node)
        if expr not in sizes:
            sizes[expr] = self._size_of_input(value)
        return sizes[expr]

    def _size_of_input(self, value: torch.SymInt) -> fx.Node:
        inputs = self.graph.find_nodes(op="placeholder")
        for node in inputs:
            tensor = tensor_of(node)
            for dim, size in enumerate(() if tensor is None else tensor.shape):
                if isinstance(size, torch.SymInt) and size.node.expr == value.node.expr:
                    with self.graph.inserting_after(inputs[-1]):
                        new = self.graph.call_function(aten.sym_size.int, (node, dim))
                    new.meta = {"val": size}
                    return new
        raise NotImplementedError(f"no node gives the size {value}")
