"""Scale the weights of many layers by one kernel on a GPU, not by one each.

Before:  W1' = W1 * s1;  W2' = W2 * s2;  ...      a launch each, of a few microseconds
After:   [W1', W2', ...] = _foreach_mul([W1, W2, ...], [s1, s2, ...])

For the weights that convolutions and their gradients take, in training as in forward folding. The
same products, to the bit; Inductor makes one kernel of each list. Weights that are scaled together
are alive together, so that a list ends at ``_MOST_BYTES``.

Declines: other devices than CUDA's, where a call costs nothing worth mentioning; scales and weights
that depend on what else the graph computes, or on another such product. Nothing moves across a call
that may write to a tensor, or draws a random number.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .._torch import compat
from ..graph.layers import is_cast, tensor_of, value_of
from .base import Outcome, Pass

__all__ = ["BatchedWeightsPass"]

aten = torch.ops.aten

_WEIGHT: dict[Any, int] = {aten.convolution.default: 1, aten.convolution_backward.default: 2}
_MOST_BYTES = 16 << 20


class BatchedWeightsPass(Pass):
    """Runs on every graph that code is generated for, after forward folding."""

    name = "batched_weights"
    hook = "post_grad_custom_pre_pass"

    def run(self, graph: fx.Graph) -> Outcome:
        ready = _computed_from_inputs(graph)
        lists: list[list[fx.Node]] = []
        size, chosen, needed = 0, set[fx.Node](), set[fx.Node]()
        for node in graph.nodes:
            product = _scaled_weight(node, ready)
            if product is None or product in chosen or product in needed:
                continue
            sources = _sources(product)
            if not chosen.isdisjoint(sources):
                continue
            chosen.add(product)
            needed |= sources
            nbytes = compat.size_hint(value_of(product).nbytes)
            size += nbytes
            if not lists or size > _MOST_BYTES or ready[product] != ready[lists[-1][0]]:
                lists.append([])
                size = nbytes
            lists[-1].append(product)
        lists = [products for products in lists if len(products) > 1]
        for products in lists:
            _batch(products, graph)
        return Outcome(sum(map(len, lists)))


def _computed_from_inputs(graph: fx.Graph) -> dict[fx.Node, int]:
    """Nodes that nothing but pointwise calls and views leads to from the graph's inputs.

    With the number of calls before each that may write to a tensor.
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
    found, pending = set[fx.Node](), [node]
    while pending:
        new = [n for n in pending.pop().all_input_nodes if n not in found]
        found.update(new)
        pending += new
    return found


def _scaled_weight(node: fx.Node, ready: dict[fx.Node, int]) -> fx.Node | None:
    """The product that a convolution takes as its weight, up to casts and views."""
    place = _WEIGHT.get(node.target)
    if place is None:
        return None
    product: Any = node.args[place]
    while (is_cast(product) or compat.is_view(product.target)) and len(product.users) == 1:
        (product,) = product.all_input_nodes
    factors = product.args if product.target is aten.mul.Tensor else ()
    if product not in ready or any(tensor_of(f) is None for f in factors) or not factors:
        return None
    return product if value_of(product).device.type == "cuda" else None


def _batch(products: list[fx.Node], graph: fx.Graph) -> None:
    """One call in the place of the first product, after what the others need."""
    needed = set[fx.Node]().union(*map(_sources, products))
    nodes = [*graph.nodes]
    first = next(n for n in nodes if n in products)
    for node in nodes[nodes.index(first) :]:
        if node in needed:
            first.prepend(node)
    left, right = zip(*(product.args for product in products), strict=True)
    with graph.inserting_before(first):
        made = graph.call_function(aten._foreach_mul.List, (list(left), list(right)))
        parts = [graph.call_function(operator.getitem, (made, i)) for i in range(len(products))]
    made.meta = {**first.meta, "val": [value_of(p) for p in products]}
    for product, part in zip(products, parts, strict=True):
        part.meta = dict(product.meta)
        product.replace_all_uses_with(part)
        graph.erase_node(product)
