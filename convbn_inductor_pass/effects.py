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
import torch.nn.functional as F
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
    for name in dir(operator)
    if name.startswith("i") and name[1:] in dir(operator) and not name.startswith("is")
} | {operator.setitem, operator.delitem}
_NUMBERS = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
_STORAGE_METHODS = {"set_", "resize_", "resize_as_", "swap_", "set_data"}
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
    mutated: list[fx.Node] = []
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            mutated.extend(_nodes(value))
    return Effect(tuple(mutated), storage=schema.name.rsplit("::")[-1] in _STORAGE_METHODS)


def _written_by_name(node: fx.Node, name: str) -> Effect:
    """The trailing-underscore convention, for methods and functions without a schema."""
    if name.startswith("__") and name.endswith("__"):
        is_inplace = name in ("__setitem__", "__delitem__") or name.startswith("__i")
        is_inplace = is_inplace and name not in ("__index__", "__int__", "__invert__")
        return Effect(_nodes(node.args[:1])) if is_inplace else PURE
    if not name.endswith("_"):
        return PURE
    every_list = name.startswith(("_foreach", "_fused", "_amp"))
    return Effect(
        _nodes((node.args, node.kwargs) if every_list else node.args[:1]),
        storage=name in _STORAGE_METHODS,
    )


def _function_effect(node: fx.Node) -> Effect:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return _schema_effect(node, target._schema)
    everything = Effect(_nodes((node.args, node.kwargs)))
    if isinstance(target, torch._ops.HigherOrderOperator):
        return everything
    if target in _INPLACE_OPERATORS:
        return Effect(_nodes(node.args[:1]))
    module = getattr(target, "__module__", None) or ""
    if module in ("_operator", "builtins", "math") and not node.kwargs:
        return PURE if target is not setattr else Effect(_nodes(node.args[:1]), storage=True)
    name = str(getattr(target, "__name__", ""))
    in_torch = module.split(".")[0] == "torch" or (inspect.isbuiltin(target) and not module)
    if isinstance(target, torch._ops.OpOverloadPacket):
        overloads = [getattr(target, o)._schema for o in target.overloads()]
        if any(s.is_mutable for s in overloads) and (
            name.endswith("_") or "out" in node.kwargs or all(s.is_mutable for s in overloads)
        ):
            return everything
        return PURE
    if not in_torch:
        return Effect(everything.mutated, region=True)
    batch_norm = torch_ir.batch_norm_call(node)
    if isinstance(batch_norm, torch_ir.BatchNormCall) and not batch_norm.training:
        return PURE
    if batch_norm is not None or target is F.instance_norm or target is torch.instance_norm:
        return everything
    if _value(node) is None:
        # Called for its effect alone: autocast, grad mode, streams, functorch levels.
        return Effect(everything.mutated, region=True)
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
    has_hooks = any(getattr(module, h, None) for h in ("_forward_hooks", "_forward_pre_hooks"))
    if not type(module).__module__.startswith("torch.nn.modules") or has_hooks:
        return Effect(everything.mutated, region=True)
    children = list(module.modules())
    if any(getattr(m, "inplace", False) for m in children):
        return everything
    writes_buffers = any(
        isinstance(m, (nn.modules.batchnorm._NormBase, nn.modules.instancenorm._InstanceNorm))
        and m.training
        for m in children
    )
    return Effect(everything.mutated, region=True) if writes_buffers else PURE


def effect_of(node: fx.Node) -> Effect:
    """What ``node`` may do beside returning a value."""
    if node.op == "call_method":
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
        if isinstance(value, _NUMBERS):
            return
        storages = (
            [self._storage(v) for v in pytree.tree_leaves(value)] if value is not None else [None]
        )
        for storage in storages:
            if storage is None:
                self._writes_anywhere.append(i)
            else:
                self._writes_to[storage].append(i)

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
            else:
                writes = self._writes_to.get(storage, [])
            if _any_within(writes, first, last):
                return True
        return False


def _any_within(positions: list[int], first: int, last: int) -> bool:
    i = bisect.bisect_left(positions, first)
    return i < len(positions) and positions[i] < last
