"""Add calls to a graph in aten IR, each computation once."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from .._torch import compat
from .layers import tensor_of

__all__ = ["Builder", "erase_unused"]

aten = torch.ops.aten


class Builder:
    """Adds calls to a graph, with metadata, and each computation once.

    Calls go to the graph's insertion point, which may only move forwards: a call that was
    made before with the same inputs is used again.

    Args:
        graph: the graph.
        share: False for graphs that write to tensors midway, where no call is used again.
        structural: inputs also count as the same if they were computed in the same way. The joint
            graph does not need it: the partitioner begins by merging such nodes.

    Call :meth:`finish` at the end.
    """

    def __init__(self, graph: fx.Graph, *, share: bool = True, structural: bool = True) -> None:
        self.graph, self.share, self.structural = graph, share, structural
        self.meta: dict[str, Any] = {}  # metadata of the calls to come, beside "val"
        self.replaced: dict[fx.Node, fx.Node] = {}
        self._made: dict[Any, fx.Node] = {}
        self._numbers: dict[fx.Node, Any] = {}
        self._interned: dict[Any, int] = {}
        self._sizes: dict[Any, fx.Node] = {}
        self._values: dict[Any, Any] = {}
        for node in graph.nodes if share and structural else ():
            self._numbers[node] = self._number(node)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Call ``target`` at the insertion point, unless that was done."""
        args, kwargs = map_aggregate((args, kwargs), self._as_argument)
        key = self._key(target, args, kwargs)
        if key in self._made:
            return self._made[key]
        node = self.graph.call_function(target, args, kwargs)
        node.meta = {**self.meta, "val": self._value(target, args, kwargs)}
        if self.share:
            self._made[key] = node
            if self.structural:
                self._numbers[node] = self._number(node)
        return node

    def current(self, node: fx.Node) -> fx.Node:
        """``node``, or what has replaced it."""
        return self.replaced.get(node, node)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let ``new`` be used for ``old``, also where later calls are given ``old``."""
        # The output's many arguments are looked through once for all, at the end.
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user.op != "output")
        self.replaced[old] = new

    def finish(self) -> None:
        """Let the graph return what has replaced what it returned."""
        for output in self.graph.find_nodes(op="output") if self.replaced else ():
            output.args = fx.map_arg(output.args, self.current)

    def _value(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The fake result of a call. Of calls that are alike, all but the first are made up."""
        like = compat.metadata_key((target, fx.map_arg((args, kwargs), lambda n: n.meta["val"])))
        if like is not None and like in self._values:
            return compat.fake_copy(self._values[like])
        values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        value = target(*values[0], **values[1])
        if like is not None:
            self._values[like] = value
        return value

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """``node`` in ``dtype``."""
        tensor = tensor_of(node)
        if tensor is not None and tensor.dtype == dtype:
            return node
        return self.call(torch.ops.prims.convert_element_type.default, node, dtype)

    def _as_argument(self, value: Any) -> Any:
        """A node as what has replaced it, a symbolic size as the node that gives it."""
        if isinstance(value, fx.Node):
            return self.current(value)
        if not isinstance(value, torch.SymInt):
            return value
        if not self._sizes:
            for node in self.graph.nodes:
                if isinstance(node.meta.get("val"), torch.SymInt):
                    self._sizes.setdefault(node.meta["val"].node.expr, node)
        if value.node.expr not in self._sizes:
            self._sizes[value.node.expr] = self._size_of_input(value)
        return self._sizes[value.node.expr]

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

    def _key(self, target: Any, args: Any, kwargs: Any) -> Any:
        if not self.share:
            return object()
        if not self.structural:
            return (target, *map(hashable, args), *sorted(kwargs.items()))
        # Not the bare number, which a constant might equal.
        parts = fx.map_arg((args, kwargs), lambda n: f"%{self._numbers.get(n, n)}")
        return (target, repr(parts))

    def _number(self, node: fx.Node) -> Any:
        """Equal for two nodes that are the same pure function of the same inputs."""
        pure = node.op == "call_function" and compat.is_pure(node.target)
        key = self._key(node.target, node.args, node.kwargs) if pure else node
        return self._interned.setdefault(key, len(self._interned))


def hashable(value: Any) -> Any:
    """``value`` with lists, however deep, as tuples; numbers of different types differ."""
    if isinstance(value, (list, tuple)):
        return tuple(map(hashable, value))
    return value if isinstance(value, fx.Node) else (type(value), value)


def erase_unused(node: fx.Node) -> None:
    """Erase ``node`` and what only it used; placeholders stay."""
    pending = [node]
    while pending:
        node = pending.pop()
        if node._erased or node.users or node.op == "placeholder" or compat.is_mutable(node.target):
            continue
        pending += node.all_input_nodes
        node.graph.erase_node(node)
