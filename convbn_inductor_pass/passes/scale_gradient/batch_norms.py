"""Find every batch norm call of a graph in aten IR, where batch norms are decomposed.

Each node has the operator that it came from as ``meta["original_aten"]``. Each decomposition
subtracts the mean from the input once, which distinguishes one call from the next.
"""

import operator
from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import fx

from ...graph import layers
from ...graph.layers import Layer, numel_of, same_shape
from ...graph.uses import is_move, source_of

aten = torch.ops.aten


class BatchNormCall(NamedTuple):
    """One call of a batch norm.

    ``node`` is its subtraction of the mean, ``input`` the tensor that it normalizes, up to casts
    and moves, ``layer`` what gives that, ``scales`` what the result is multiplied with; ``trains``
    if it normalizes with the statistics of ``input``.
    """

    node: fx.Node
    input: fx.Node
    layer: Layer | None
    scales: tuple[fx.Node, ...]
    trains: bool


def find_batch_norms(
    graph: fx.Graph, backward: Collection[fx.Node], *, without_origin: bool = False
) -> Iterator[BatchNormCall]:
    """The batch norm calls of the forward in ``graph``, in order.

    In the bodies of some higher-order operators, nodes lack that metadata: with
    ``without_origin``, any per-channel subtraction from a layer's output counts.
    """
    for node in graph.nodes:
        if node.target is not aten.sub.Tensor or node in backward:
            continue
        minuend, mean = node.args
        if not same_shape(minuend, node):
            continue
        source = source_of(minuend, casts=True)
        layer, origin = layers.layer_of(source), str(node.meta.get("original_aten", ""))
        is_batch_norm = "batch_norm" in origin and "backward" not in origin
        # Batch statistics are results of ``var_mean`` in decompositions.
        is_result = isinstance(mean, fx.Node) and mean.target is operator.getitem
        trains = is_result and mean.args[0].target is aten.var_mean.correction
        if is_batch_norm or (without_origin and layer is not None):
            yield BatchNormCall(node, source, layer, tuple(_scales(node, backward)), trains)


def subgraphs_of(graph: fx.Graph, backward: Collection[fx.Node] = ()) -> Iterator[fx.Graph]:
    """Graphs that ``graph`` hands to higher-order operators of the forward, and those inside."""
    for node in graph.find_nodes(op="get_attr"):
        inner = getattr(graph.owning_module, str(node.target), None)
        if isinstance(inner, fx.GraphModule) and not all(u in backward for u in node.users):
            yield inner.graph
            yield from subgraphs_of(inner.graph)


def _scales(node: fx.Node, backward: Collection[fx.Node]) -> Iterator[fx.Node]:
    """What the difference is multiplied with in the forward, one factor after the other.

    Small tensors may be added in between, and elements moved: vmap multiplies after that.
    """
    while len(users := [u for u in node.users if u not in backward]) == 1:
        (user,) = users
        others = [n for n in user.all_input_nodes if n is not node]
        is_shift = user.target is aten.add.Tensor and sum(map(numel_of, others)) < numel_of(node)
        if user.target is aten.mul.Tensor:
            yield from others
        elif not (is_shift or is_move(user) or layers.is_cast(user)):
            return
        node = user
