"""Compute slow values per channel once per channel on CPU, not once per element.

Before:  y = (x - mean) * (1 / sqrt(var + eps)) * gamma + beta        all in one loop over x
After:   r = stored(1 / sqrt(var + eps));  y = (x - mean) * r * gamma + beta

Works around: Inductor inlines into a pointwise loop what it is computed from, however small and
however slow (torch 2.11 to 2.15): a batch norm's square root and division are computed again for
each pixel, and take as long as all the rest; so are the gates of squeeze-and-excitation, one value
per image and channel. ``python -m bench run --suite forward`` measures it: ``ours``, ``eval``.

Can go: once Inductor realizes (stores) small expensive buffers that large loops read.

What is stored was in a register before, in the same dtype: every bit stays the same. Declines:
other devices, where it was not measured; float16 and bfloat16, which would be rounded where
Inductor does not; results too small or not read often enough to be worth a loop; values computed
from sums, as in layer norms, which Inductor computes in the loop over their rows.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from ..._torch import compat, inductor
from ...graph.layers import tensor_of, value_of

__all__ = ["store_invariants"]

aten = torch.ops.aten

# One of these for 16 elements takes about as long as to load, add, multiply and store them.
_SLOW = {
    *(aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default, aten.div.Tensor),
    *(aten.pow.Tensor_Scalar, aten.exp.default, aten.sigmoid.default, aten.tanh.default),
}
_LEAST_ELEMENTS = 1 << 14  # of what is computed from it: some microseconds
_LEAST_REUSE = 16


def store_invariants(graph: fx.Graph) -> int:
    """Have small values that large ones are computed from stored, if they are slow to compute.

    ``graph`` is in aten IR. Returns how many are.
    """
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op != "call_function" or not compat.is_pointwise(node.target):
            continue
        value = tensor_of(node)
        if value is None or value.device.type != "cpu":
            continue
        size = compat.size_hint(value.numel())
        if size < _LEAST_ELEMENTS:
            continue
        for source in map(_behind_views, node.all_input_nodes):
            small = tensor_of(source)
            if small is None or size < _LEAST_REUSE * compat.size_hint(small.numel()):
                continue
            if source not in found and _can_be_stored(source, small) and _is_slow(source, found):
                found[source] = None
    for node in found:
        _store(graph, node)
    return len(found)


def _behind_views(node: fx.Node) -> fx.Node:
    while compat.is_view(node.target) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _can_be_stored(node: fx.Node, value: Tensor) -> bool:
    return (
        node.op == "call_function"
        and compat.is_pointwise(node.target)
        and value.device.type == "cpu"
        and value.dtype in (torch.float32, torch.float64)
        and value.ndim > 0
        and all(isinstance(stride, int) and stride > 0 for stride in value.stride())
    )


def _is_slow(node: fx.Node, stored: dict[fx.Node, None]) -> bool:
    """Whether Inductor would compute something slow again for each use of ``node``.

    From nothing but inputs of the graph, results of library calls, and what is stored already.
    """
    is_slow, seen, todo = False, {node}, [node]
    while todo:
        node = todo.pop()
        is_slow |= node.target in _SLOW
        for source in map(_behind_views, node.all_input_nodes):
            if source in seen or source in stored:
                continue
            seen.add(source)
            if compat.is_pointwise(source.target):
                todo.append(source)
            elif _is_reduction(source):
                return False
    return is_slow


def _is_reduction(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        (node,) = node.all_input_nodes
    return inductor.is_generated(node.target)


def _store(graph: fx.Graph, node: fx.Node) -> None:
    value = value_of(node)
    users = list(node.users)
    with graph.inserting_after(node):
        stored = graph.call_function(inductor.force_stride_order, (node, list(value.stride())))
    stored.meta = dict(node.meta)
    for user in users:
        user.replace_input_with(node, stored)
