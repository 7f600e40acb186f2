"""Find every batch norm call of a graph in aten IR, which holds none: they are decomposed.

A call's nodes have the operator that they were as ``meta["original_aten"]``. Each decomposition
subtracts the mean from the input once, which tells one call from the next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from ...graph import layers
from ...graph.layers import Layer, same_sizes, tensor_of
from .find import is_move

__all__ = ["BatchNormCall", "find_batch_norms", "subgraphs_of"]

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class BatchNormCall:
    """One call of a batch norm.

    Attributes:
        node: its subtraction of the mean; has the provenance of the call.
        input: the tensor that it normalizes.
        layer: the convolution or linear layer that gives ``input``, up to casts and moves.
        trains: whether it normalizes with the statistics of ``input``.
    """

    node: fx.Node
    input: fx.Node
    layer: Layer | None
    trains: bool


def find_batch_norms(graph: fx.Graph, backward: set[fx.Node]) -> Iterator[BatchNormCall]:
    """The batch norm calls of the forward in ``graph``, in order."""
    for node in graph.nodes:
        if node in backward or not _is_of_batch_norm(node) or node.target is not aten.sub.Tensor:
            continue
        minuend: Any = node.args[0]
        value, mean = tensor_of(minuend), node.args[1]
        if value is None or not same_sizes(value.shape, node.meta["val"].shape):
            continue
        source = _without_moves(minuend)
        layer = layers.layer_of(source)
        yield BatchNormCall(node, source, layer, _depends_on(mean, minuend))


def subgraphs_of(graph: fx.Graph) -> Iterator[fx.Graph]:
    """The graphs that ``graph`` hands to higher-order operators, and those inside of them."""
    owner = graph.owning_module
    for node in graph.find_nodes(op="get_attr"):
        inner = getattr(owner, str(node.target), None)
        if isinstance(inner, fx.GraphModule):
            yield inner.graph
            yield from subgraphs_of(inner.graph)


def _is_of_batch_norm(node: fx.Node) -> bool:
    operator = str(node.meta.get("original_aten", ""))
    return "batch_norm" in operator and "backward" not in operator


def _without_moves(node: fx.Node) -> fx.Node:
    while layers.is_cast(node) or is_move(node):
        node = node.all_input_nodes[0]
    return node


def _depends_on(node: Any, source: fx.Node) -> bool:
    """Whether the few nodes that make the mean go back to what it is the mean of."""
    seen: set[fx.Node] = set()
    pending = [node] if isinstance(node, fx.Node) else []
    while pending:
        node = pending.pop()
        if node is source or node in source.all_input_nodes:
            return True
        if node not in seen and _is_of_batch_norm(node):
            seen.add(node)
            pending += node.all_input_nodes
    return False
