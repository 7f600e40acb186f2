"""Compute slow values per channel once per channel on CPU, not once per element.

Before:  y = (x - mean) * (1 / sqrt(var + eps)) * gamma + beta        all in one loop over x
After:   r = stored(1 / sqrt(var + eps));  y = (x - mean) * r * gamma + beta

Works around: Inductor inlines the inputs of a pointwise loop into it, however small and slow to
compute (torch 2.11 to 2.15): a batch norm's root and division are recomputed for each pixel, and
take as long as all else (``python -m bench run --suite forward``: ``ours``, ``eval``). Can be
removed once Inductor realizes (stores) small expensive buffers that large loops read.

The stored value was in a register before, in the same dtype: results are bitwise equal. Declines:
other devices, where it was not measured; float16 and bfloat16, which would be rounded where
Inductor does not; results too small or not read often enough to be worth a loop; values computed
from sums, as in layer norms, which Inductor computes in the loop over their rows.
"""

import operator

import torch
from torch import fx

from .._torch import compat
from ..graph.layers import numel_of, tensor_of, value_of
from ..graph.uses import reachable, source_of
from .base import Outcome, Pass

aten = torch.ops.aten

# One of these for 16 elements takes about as long as to load, add, multiply and store them.
_SLOW = {
    *(aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default, aten.div.Tensor),
    *(aten.pow.Tensor_Scalar, aten.exp.default, aten.sigmoid.default, aten.tanh.default),
}
_LEAST_ELEMENTS = 1 << 14  # of what is computed from it: some microseconds
_LEAST_REUSE = 16


class CpuCodegenPass(Pass):
    """Runs on every graph that code is generated for, after other passes have changed it."""

    name = "cpu_codegen"
    hook = "post_grad_custom_pre_pass"

    def run(self, graph: fx.Graph) -> Outcome:
        return Outcome(store_invariants(graph))


def store_invariants(graph: fx.Graph) -> int:
    """Store small, slow values from which large ones are computed; returns how many."""
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        size = numel_of(node)
        if size < _LEAST_ELEMENTS or not _is_in_a_loop(node):
            continue
        for source in map(source_of, node.all_input_nodes):
            is_small = size >= _LEAST_REUSE * numel_of(source)
            if is_small and _can_be_stored(source) and _is_slow(source, found):
                found[source] = None
    for node in found:
        _store(node)
    return len(found)


def _is_in_a_loop(node: fx.Node) -> bool:
    """Whether C++ code is generated that computes ``node`` element by element."""
    value = tensor_of(node) if compat.is_pointwise(node.target) else None
    return value is not None and value.device.type == "cpu"


def _can_be_stored(node: fx.Node) -> bool:
    if not _is_in_a_loop(node):
        return False
    value = value_of(node)
    is_dense = value.ndim > 0 and all(isinstance(s, int) and s > 0 for s in value.stride())
    return is_dense and value.dtype in (torch.float32, torch.float64)


def _is_slow(node: fx.Node, stored: dict[fx.Node, None]) -> bool:
    """Whether Inductor would compute something slow again for each use of ``node``.

    From nothing but inputs of the graph, results of library calls, and what is stored already.
    """

    def sources(n: fx.Node) -> list[fx.Node]:
        found = n.all_input_nodes if compat.is_pointwise(n.target) else ()
        return [source for source in map(source_of, found) if source not in stored]

    inlined = [*reachable([node], sources)]
    return any(n.target in _SLOW for n in inlined) and not any(map(_is_reduction, inlined))


def _is_reduction(node: fx.Node) -> bool:
    from .._torch import inductor  # here, because registering must not load a compiler

    if node.target is operator.getitem:
        (node,) = node.all_input_nodes
    return inductor.is_generated(node.target) and not compat.is_pointwise(node.target)


def _store(node: fx.Node) -> None:
    from .._torch import inductor

    strides = list(value_of(node).stride())
    with node.graph.inserting_after(node):
        stored = node.graph.call_function(inductor.force_stride_order, (node, strides))
    stored.meta = dict(node.meta)
    node.replace_all_uses_with(stored, delete_user_cb=lambda user: user is not stored)
