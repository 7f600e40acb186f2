"""Scale the weights of many layers in one GPU kernel, not in one each; and shift biases.

Before:  W1' = W1 * s1;  W2' = W2 * s2;  ...      a launch each, of a few microseconds
After:   [W1', W2', ...] = _foreach_mul([W1, W2, ...], [s1, s2, ...])

For the weights that convolutions and their gradients take, in training as in forward folding, and
the biases of cuDNN's convolutions with a ReLU, which end in a product or a sum. The same values, to
the bit; Inductor makes one kernel of each list. What is computed together is alive together, so a
list is limited to ``_MOST_BYTES``.

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
from ..graph.layers import is_cast, tensor_of, value_of
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
        from .._torch import inductor  # here, because registering must not load a compiler

        ready = _computed_from_inputs(graph)
        lists: list[list[fx.Node]] = []
        open_lists: dict[Any, tuple[list[fx.Node], int]] = {}  # and their bytes
        chosen, needed = set[fx.Node](), set[fx.Node]()
        for node in (n for taker in graph.nodes for n in _computed_for(taker, ready)):
            sources = _sources(node)
            if node in chosen or node in needed or not chosen.isdisjoint(sources):
                continue
            chosen.add(node)
            needed |= sources
            nbytes, key = compat.size_hint(value_of(node).nbytes), (node.target, ready[node])
            nodes, size = open_lists.get(key, ([], 0))
            if not nodes or size + nbytes > _MOST_BYTES:
                nodes, size = [], 0
                lists.append(nodes)
            nodes.append(node)
            open_lists[key] = nodes, size + nbytes
        lists = [nodes for nodes in lists if len(nodes) > 1]
        channels_last = bool(lists) and inductor.makes_channels_last(graph)
        for nodes in lists:
            _batch(nodes, graph, channels_last)
        return Outcome(sum(map(len, lists)))


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


def _batch(nodes: list[fx.Node], graph: fx.Graph, channels_last: bool) -> None:
    """One call in the place of the first of ``nodes``, after what the others need."""
    needed = set[fx.Node]().union(*map(_sources, nodes))
    every = [*graph.nodes]
    first = next(n for n in every if n in nodes)
    for node in every[every.index(first) :]:
        if node in needed:
            first.prepend(node)
    left, right = zip(*(node.args for node in nodes), strict=True)
    with graph.inserting_before(first):
        made = graph.call_function(_LISTS[first.target], (list(left), list(right)))
        made.meta = {**first.meta, "val": [value_of(n) for n in nodes]}
        for i, node in enumerate(nodes):
            part = graph.call_function(operator.getitem, (made, i))
            part.meta = dict(node.meta)
            # Other users of it, or of a view of it, may depend on its layout in memory.
            is_weight = len(node.users) == 1 and not compat.is_view(next(iter(node.users)).target)
            if channels_last and is_weight and value_of(node).ndim == 4:
                part = _in_channels_last(part)
            node.replace_all_uses_with(part)
    for node in nodes:
        graph.erase_node(node)


def _in_channels_last(node: fx.Node) -> fx.Node:
    """``node``, stored as convolutions need it: else a cast in between is a separate kernel."""
    from .._torch import inductor

    value = value_of(node)
    like = torch.empty(value.shape, device="meta", memory_format=torch.channels_last)
    made = node.graph.call_function(inductor.force_stride_order, (node, list(like.stride())))
    with compat.fake_mode_of(value):
        laid_out = torch.empty_strided(
            value.shape, like.stride(), dtype=value.dtype, device=value.device
        )
    made.meta = {**node.meta, "val": laid_out}
    return made
