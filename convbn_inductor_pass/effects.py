"""What the nodes of a torch-IR graph do beside computing their value.

Torch IR is neither functional nor normalised: nodes mutate tensors, alias them, and switch
autocast or grad mode. Fusing moves a convolution down to its batch norm, which is right only
if nothing on the way changes what the convolution sees. A node that is not known to be
harmless is taken to do the worst.
"""

from __future__ import annotations

import bisect
import collections
import functools
import inspect
import operator
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from . import _compat, torch_ir

__all__ = ["Effects"]


class Effect(NamedTuple):
    """What one node does: nodes whose tensors it may write to, or a change of mode."""

    mutated: tuple[fx.Node, ...] = ()
    region: bool = False
    # Moves a tensor to other storage, after which recorded aliasing no longer holds.
    storage: bool = False


PURE = Effect()

_INPLACE_OPERATORS = {
    getattr(operator, name)
    for name in (
        *("iadd", "iand", "iconcat", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior"),
        *("ipow", "irshift", "isub", "itruediv", "ixor", "setitem", "delitem"),
    )
}
_NUMBERS = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
_STORAGE_METHODS = {"set_", "resize_", "resize_as_", "swap_", "set_data"}
# Modules of torch whose functions follow the conventions below. Others, such as Dynamo's wrappers
# of NumPy functions (``wrapped_iadd``), need not.
_CONVENTIONAL = re.compile(
    r"torch(\._C(\._\w+)?|\._VF|\.functional|\.nn\.functional|\._jit_internal|\._tensor|\._ops(\.\w+)?)?"
)
# Operators that write to what their schema, if they have one, does not say: running statistics.
_WRITES_UNSAID = re.compile(r"batch_norm|instance_norm|moving_avg|flatten_weight")
_FUNCTORCH_LEVEL = re.compile(r"_(?:vmap|grad|jvp|func\w*)_(increment|decrement)_nesting")


def _nodes(value: Any) -> tuple[fx.Node, ...]:
    found: list[fx.Node] = []
    fx.map_arg(value, lambda n: found.append(n))
    return tuple(found)


@functools.cache
def _signature(target: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(target)
    except (TypeError, ValueError):
        return None


def _by_name(node: fx.Node, name: str) -> Any:
    """Value of a Python function's argument ``name`` in this call, None if it has none such."""
    if name in node.kwargs:
        return node.kwargs[name]
    signature = _signature(node.target)
    if signature is None or name not in signature.parameters:
        return None
    try:
        return signature.bind(*node.args, **node.kwargs).arguments.get(name)
    except TypeError:
        return None


def _schema_effect(node: fx.Node, schema: torch.FunctionSchema) -> Effect:
    name = schema.name.rsplit("::")[-1]
    mutated = list(_written_by_name(node, name).mutated)
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            mutated.extend(_nodes(value))
    return Effect(tuple(mutated), storage=name in _STORAGE_METHODS)


def _written_by_name(node: fx.Node, name: str) -> Effect:
    """The trailing-underscore convention, for methods and functions without a schema."""
    first = _nodes(node.args[:1] or node.kwargs)
    if name.startswith("__") and name.endswith("__"):
        is_inplace = name in ("__setitem__", "__delitem__") or name.startswith("__i")
        is_inplace = is_inplace and name not in ("__index__", "__int__", "__invert__")
        return Effect(first) if is_inplace else PURE
    if name in _STORAGE_METHODS:
        return Effect(first, storage=True)
    if not name.endswith("_"):
        return PURE
    every_list = name.startswith(("_foreach", "_fused", "_amp"))
    return Effect(_nodes((node.args, node.kwargs)) if every_list else first)


@functools.cache
def _may_write_without_underscore(name: str) -> bool:
    """Whether a function of aten writes to an argument other than ``out``, by name or schema."""
    if _WRITES_UNSAID.search(name):
        return True
    packet = getattr(torch.ops.aten, name, None)
    if name.startswith("__") or not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    arguments = [a for schema in schemas for a in schema.arguments if "Tensor" in str(a.type)]
    return any(a.alias_info and a.alias_info.is_write and not a.is_out for a in arguments)


def _bodies_write_nothing(node: fx.Node) -> bool:
    """Whether a higher-order operator runs graphs of which none writes to what it is given."""
    owner = node.graph.owning_module
    values = [
        torch_ir._attribute(owner, str(n.target))
        for n in node.all_input_nodes
        if n.op == "get_attr"
    ]
    bodies = [value for value in values if isinstance(value, fx.GraphModule)]
    return bool(bodies) and not any(Effects(body.graph).writes_outside for body in bodies)


def _function_effect(node: fx.Node) -> Effect:
    target: Any = node.target
    everything = Effect(_nodes((node.args, node.kwargs)))
    worst = Effect(everything.mutated, region=True)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return PURE if _bodies_write_nothing(node) else everything
    if target in _INPLACE_OPERATORS:
        return Effect(_nodes(node.args[:1]))
    module = getattr(target, "__module__", None) or ""
    if module in ("_operator", "builtins", "math") and not node.kwargs:
        return PURE if target is not setattr else Effect(_nodes(node.args[:1]), storage=True)
    batch_norm = torch_ir.batch_norm_call(node)
    if isinstance(batch_norm, torch_ir.BatchNormCall) and not batch_norm.training:
        return PURE
    name = str(getattr(target, "__name__", ""))
    if isinstance(target, torch._ops.OpOverload):
        unsaid = _WRITES_UNSAID.search(name) is not None
        return everything if unsaid else _schema_effect(node, target._schema)
    if isinstance(target, torch._ops.OpOverloadPacket):
        schemas = [getattr(target, overload)._schema for overload in target.overloads()]
        by_schema = any(s.is_mutable for s in schemas) and (
            name.endswith("_") or "out" in node.kwargs or all(s.is_mutable for s in schemas)
        )
        if by_schema or _may_write_without_underscore(name):
            return everything
        return _written_by_name(node, name)
    conventional = _CONVENTIONAL.fullmatch(module) if module else inspect.isbuiltin(target)
    if not conventional or _value(node) is None:
        # Called for its effect alone: autocast, grad mode, streams, functorch levels.
        return worst
    if _may_write_without_underscore(name):
        return everything
    if node.kwargs.get("out") is not None:
        return Effect(_nodes(node.kwargs["out"]))
    if _by_name(node, "inplace") or _by_name(node, "max_norm") is not None:
        return everything
    return _written_by_name(node, name)


def _value(node: fx.Node) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))


def _module_effect(node: fx.Node) -> Effect:
    module = torch_ir._attribute(node.graph.owning_module, str(node.target))
    everything = Effect(_nodes((node.args, node.kwargs)))
    worst = Effect(everything.mutated, region=True)
    if not isinstance(module, nn.Module):
        return worst
    modules = list(module.modules())
    if not all(torch_ir.is_as_its_class_says(m) for m in modules):
        return worst
    if any(getattr(m, "inplace", False) for m in modules):
        return everything
    writes_buffers = any(
        getattr(m, "max_norm", None) is not None
        or (
            isinstance(m, (nn.modules.batchnorm._NormBase, nn.modules.instancenorm._InstanceNorm))
            and m.training
        )
        for m in modules
    )
    return worst if writes_buffers else PURE


def _is_no_tensor(node: fx.Node) -> bool:
    """Whether a node without a recorded value is a graph for an operator, or a mode entered."""
    if node.op == "get_attr":
        value = torch_ir._attribute(node.graph.owning_module, str(node.target))
        return isinstance(value, nn.Module)
    return str(getattr(node.target, "__name__", "")).startswith("_enter_")


def effect_of(node: fx.Node) -> Effect:
    """What ``node`` may do beside returning a value."""
    if node.op == "call_method":
        if _value(node) is None:
            return Effect(_nodes((node.args, node.kwargs)), region=True)
        return _written_by_name(node, str(node.target))
    if node.op == "call_module":
        return _module_effect(node)
    if node.op == "call_function":
        return _function_effect(node)
    return PURE


class Effects:
    """The effects of a whole graph, indexed so that each question costs a bisection.

    Built once, in time linear in the graph; valid until the graph changes.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.position: dict[fx.Node, int] = {}
        self.storage_changes = False
        self._graph = graph
        self._regions: list[int] = []
        self._writes: list[int] = []
        # Positions of writes by the storage written to; those whose storage is unknown.
        self._writes_to: dict[int, list[int]] = collections.defaultdict(list)
        self._writes_anywhere: list[int] = []
        self._levels: list[tuple[int, int]] = [(-1, 0)]
        # Storages that are one although tracing made two of them.
        self._alias: dict[int, int] = {}
        for i, node in enumerate(graph.nodes):
            self.position[node] = i
            self._track_alias(node)
            effect = effect_of(node)
            if effect.region:
                self._regions.append(i)
                self._track_level(i, node)
            if effect.mutated:
                self._writes.append(i)
            for written in effect.mutated:
                self._record_write(i, written)
            self.storage_changes = self.storage_changes or effect.storage

    def _track_alias(self, node: fx.Node) -> None:
        """A dropout that does nothing returns its input; fake tensors return a copy (<= 2.14)."""
        if not torch_ir.is_idle_dropout(node) or not node.all_input_nodes:
            return
        inner, outer = (self._storage(_value(n)) for n in (node.all_input_nodes[0], node))
        if inner is not None and outer is not None and inner != outer:
            self._alias[outer] = inner

    def _storage(self, value: Any) -> int | None:
        key = _compat.storage_key(value)
        while key in self._alias:
            key = self._alias[key]
        return key

    def _record_write(self, i: int, written: fx.Node) -> None:
        value = _value(written)
        if isinstance(value, _NUMBERS) or (value is None and _is_no_tensor(written)):
            return
        storages = (
            [self._storage(v) for v in pytree.tree_leaves(value)] if value is not None else [None]
        )
        for storage in storages:
            if storage is None:
                self._writes_anywhere.append(i)
            else:
                self._writes_to[storage].append(i)

    @functools.cached_property
    def writes_outside(self) -> list[int]:
        """Positions of writes to storages that the graph did not, or may not have made itself."""
        made_here: set[int | None] = set()
        outside: set[int | None] = set()
        for node in self._graph.nodes:
            makes = node.op in ("call_function", "call_method", "call_module")
            makes = makes and not effect_of(node).region  # else it may return anything
            makes = makes and not isinstance(node.target, torch._ops.HigherOrderOperator)
            for leaf in pytree.tree_leaves(_value(node)):
                storage = self._storage(leaf)
                if storage not in made_here and storage not in outside:
                    (made_here if makes else outside).add(storage)
        outside.discard(None)
        positions = {i for key, at in self._writes_to.items() if key in outside for i in at}
        return sorted(positions.union(self._writes_anywhere))

    def _track_level(self, i: int, node: fx.Node) -> None:
        name = str(getattr(node.target, "__name__", node.target))
        if match := _FUNCTORCH_LEVEL.search(name):
            step = 1 if match.group(1) == "increment" else -1
            self._levels.append((i, self._levels[-1][1] + step))

    def in_functorch(self, node: fx.Node) -> bool:
        """Whether ``node`` runs inside a torch.func transform that the graph enters."""
        i = bisect.bisect_left(self._levels, (self.position[node], -1)) - 1
        return self._levels[i][1] > 0

    def region_between(self, first: fx.Node, last: fx.Node) -> bool:
        """Whether a mode may change strictly between two nodes."""
        return _any_within(self._regions, self.position[first] + 1, self.position[last])

    def writer(
        self,
        operands: Iterable[torch_ir.Operand],
        after: fx.Node,
        before: fx.Node | None = None,
    ) -> bool:
        """Whether one of ``operands``, or an alias of it, may be written to strictly between
        ``after`` and ``before`` (the end of the graph if None)."""
        first = self.position[after] + 1
        last = self.position[before] if before is not None else len(self.position)
        if _any_within(self._writes_anywhere, first, last):
            return True
        for operand in operands:
            if operand is None:
                continue
            storage = self._storage(torch_ir.tensor_of(operand))
            # With storages exchanged or unknown, any write may be the one.
            if storage is None or self.storage_changes:
                writes = self._writes
            elif isinstance(operand, torch_ir.ModuleTensor):
                # Real, while those recorded at nodes are fake: they cannot be compared.
                writes = self.writes_outside
            else:
                writes = self._writes_to.get(storage, [])
            if _any_within(writes, first, last):
                return True
        return False


def _any_within(positions: list[int], first: int, last: int) -> bool:
    i = bisect.bisect_left(positions, first)
    return i < len(positions) and positions[i] < last
