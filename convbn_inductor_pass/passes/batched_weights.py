"""Scale the weights of many layers in one GPU kernel, not in one each; and shift biases.

Before:  W1' = W1 * s1;  W2' = W2 * s2;  ...      a launch each, of a few microseconds
After:   [W1', W2', ...] = _foreach_mul([W1, W2, ...], [s1, s2, ...])

For weights that convolutions and their gradients take, and biases of ``convolution_relu``. The same
values, to the bit. What is computed together is alive together: a list has ``_MOST_BYTES`` at most.

Declines: devices other than CUDA, where a call costs next to nothing; values that depend on
anything other than pointwise functions of graph inputs, or on another list; on torch 2.11 and 2.12,
values that are cast afterwards, as under autocast. Nothing moves across a call that may write to a
tensor or draw a random number.
"""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from .._torch import compat
from ..graph.layers import bytes_of, is_cast, tensor_of, value_of
from ..graph.operators import convolution_relu
from ..graph.uses import reachable
from .base import Outcome, Pass

aten = torch.ops.aten

# Which arguments of a call are computed in lists, and by what.
_TAKEN: dict[Any, tuple[int, ...]] = {
    aten.convolution.default: (1,),
    aten.convolution_backward.default: (2,),
    convolution_relu: (1, 2),
}
_LISTS: dict[Any, Any] = {
    aten.mul.Tensor: aten._foreach_mul.List,
    aten.add.Tensor: aten._foreach_add.List,
}
_MOST_BYTES = 16 << 20


class BatchedWeightsPass(Pass):
    """Runs on every graph that code is generated for, after forward folding."""

    name = "batched_weights"
    hook = "post_grad_custom_pre_pass"

    def run(self, graph: fx.Graph) -> Outcome:
        # Here, because registering must not load a compiler.
        from .._torch import inductor
        from ..graph.builder import Builder

        ready = _computed_from_inputs(graph)
        lists: dict[Any, list[list[fx.Node]]] = {}  # for each key, the last one is open
        chosen, needed = set[fx.Node](), set[fx.Node]()
        for node in (n for taker in graph.nodes for n in _computed_for(taker, ready)):
            sources = _sources(node)
            if node in chosen or node in needed or not chosen.isdisjoint(sources):
                continue
            chosen.add(node)
            needed |= sources
            found = lists.setdefault((node.target, ready[node]), [[]])
            if sum(map(bytes_of, [*found[-1], node])) > _MOST_BYTES:
                found.append([])
            found[-1].append(node)
        wanted = [nodes for found in lists.values() for nodes in found if len(nodes) > 1]
        channels_last = bool(wanted) and inductor.makes_channels_last(graph)
        with Builder(graph) as build:
            for nodes in wanted:
                _batch(nodes, build, channels_last)
        return Outcome(sum(map(len, wanted)))


def _computed_from_inputs(graph: fx.Graph) -> dict[fx.Node, int]:
    """Nodes computed from the graph's inputs by pointwise calls and views only.

    Each with the number of calls before it that may write to a tensor.
    """
    found: dict[fx.Node, int] = {}
    writes = 0
    for node in graph.nodes:
        writes += compat.is_mutable(node.target)
        known = compat.is_pointwise(node.target) or compat.is_view(node.target)
        known = known and compat.is_pure(node.target)
        if node.op == "placeholder" or (known and all(n in found for n in node.all_input_nodes)):
            found[node] = writes
    return found


def _sources(node: fx.Node) -> set[fx.Node]:
    """What ``node`` is computed from."""
    return {*reachable(node.all_input_nodes, lambda n: n.all_input_nodes)}


def _computed_for(taker: fx.Node, ready: dict[fx.Node, int]) -> Iterator[fx.Node]:
    """The products and sums that a convolution takes, up to casts, views and strides."""
    for place in _TAKEN.get(taker.target, ()):
        node: Any = taker.args[place]
        while node is not None and len(node.users) == 1 and _keeps_values(node):
            node = node.all_input_nodes[0]
        if node not in ready or node.target not in _LISTS or node.kwargs:
            continue
        on_cuda = value_of(node).device.type == "cuda"
        is_alone = compat.LISTS_MAY_BE_FUSED or len(node.users) == 1
        if on_cuda and is_alone and all(tensor_of(n) is not None for n in node.args):
            yield node


def _keeps_values(node: fx.Node) -> bool:
    from .._torch import inductor

    if is_cast(node):
        return compat.LISTS_MAY_BE_FUSED
    return node.target is inductor.force_stride_order or compat.is_view(node.target)


def _batch(nodes: list[fx.Node], build: Any, channels_last: bool) -> None:
    """One call in the place of the first of ``nodes``, after what the others need."""
    from .._torch import inductor

    first, needed = min(nodes), set[fx.Node]().union(*map(_sources, nodes))
    for node in sorted(n for n in needed if n > first):
        first.prepend(node)
    left, right = zip(*(node.args for node in nodes), strict=True)
    with build.graph.inserting_before(first):
        build.meta = first.meta
        made = build.call(_LISTS[first.target], [*left], [*right])
        for i, node in enumerate(nodes):
            build.meta, value = node.meta, value_of(node)
            part = build.call(operator.getitem, made, i)
            part.meta["val"] = value  # as it was: views of it are in this memory
            # Other users of it, or of a view of it, may depend on its layout in memory.
            is_weight = len(node.users) == 1 and not compat.is_view(next(iter(node.users)).target)
            if channels_last and is_weight and value.ndim == 4:
                # As convolutions need it: else a cast in between is a separate kernel.
                value = torch.empty_like(value, memory_format=torch.channels_last)
                strides = [*value.stride()]
                part = build.graph.call_function(inductor.force_stride_order, (part, strides))
                part.meta = {**node.meta, "val": value}
            build.replace(node, part)
