"""Records of what was decided: one for each batch norm call, one for each other scale.

In aten IR batch norms are decomposed. Each node has the operator that it came from as
``meta["original_aten"]``; each decomposition subtracts the mean from the input once.
"""

import operator
from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import fx

from ..._torch import inductor
from ...codes import Code
from ...graph import layers, uses
from ...graph.layers import Layer, bytes_of, numel_of, same_shape
from ...graph.provenance import module_path
from ...records import Record
from ..base import record_of
from .decide import Decision

aten = torch.ops.aten

NamedRecord = tuple[str, Record]
"""The name of the node of the layer whose output it is about, "" if none, and the record."""


class _BatchNormCall(NamedTuple):
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


def account(graph: fx.Graph, decisions: list[Decision]) -> list[NamedRecord]:
    """Records of all decisions about ``graph``; call it before they are applied."""
    if not inductor.is_outermost(graph):
        return []  # accounted for where it is called
    backward = uses.backward_of(graph)
    trained = uses.depending_on([*inductor.trained_inputs(graph)]) if backward else set()
    by_value = {value: d for d in decisions for value in d.candidate.values}
    found: list[NamedRecord] = []
    counted: set[fx.Node | None] = {None}  # None: no layer, nothing to save
    for bn in _find_batch_norms(graph, backward):
        decision = by_value.get(bn.input)
        layer = bn.layer if decision is None else decision.candidate.layer
        code, detail = _code(bn, decision, trained)
        node = None if layer is None else layer.node
        # The output of a layer with several batch norms is not saved twice.
        found.append(_record(layer, code, detail, bn.node, saves=node not in counted))
        counted.add(node)
    scales = (d for d in decisions if d.candidate.layer.node not in counted)
    found += [_record(d.candidate.layer, d.code, d.detail) for d in scales]
    for inner in _subgraphs_of(graph, backward):
        for bn in _find_batch_norms(inner, (), without_origin=True):
            code = Code.BATCH_STATISTICS if bn.trains else Code.INSIDE_HIGHER_ORDER_OP
            found.append(_record(bn.layer, code if backward else Code.NO_GRAD, "", bn.node))
    return found


def _code(bn: _BatchNormCall, decision: Decision | None, trained: set[fx.Node]) -> tuple[Code, str]:
    """The code of a batch norm call; ``trained`` is empty in a graph without a backward."""
    if not trained:
        return Code.NO_GRAD, ""
    if bn.trains:
        return Code.BATCH_STATISTICS, ""
    if decision is not None:
        return decision.code, decision.detail
    if bn.layer is None and bn.input.op == "placeholder":
        return Code.LAYER_IN_ANOTHER_GRAPH, f"{bn.input} is an input of the graph"
    if bn.layer is None:
        return Code.NOT_AFTER_LAYER, f"it follows {bn.input}"
    if not any(scale in trained for scale in bn.scales):
        return Code.AFFINE_FROZEN, ""
    if layers.operand_per_channel(bn.node.args[1], bn.layer.out.shape, bn.layer.dim) is None:
        return Code.UNBATCHED, f"{bn.layer.node} has another"
    return Code.OTHER_GRADIENT, str(bn.layer.node)


def _record(
    layer: Layer | None, code: Code, detail: str, bn: fx.Node | None = None, *, saves: bool = True
) -> NamedRecord:
    saved = None
    if layer is not None and saves and code.rewritten and not uses.is_recomputed(layer.node):
        saved = layer.node if code is Code.FUSED else layer.weight
    record = record_of(
        None if layer is None else layer.node,
        at=bn,
        pass_name="scale_gradient",
        kind="batch norm" if bn else "scale",
        code=code,
        detail=detail,
        batch_norm=(module_path(bn) or str(bn)) if bn else "",
        bytes_saved=bytes_of(saved),
    )
    return (layer.node.name if layer is not None and saves else ""), record


def _find_batch_norms(
    graph: fx.Graph, backward: Collection[fx.Node], *, without_origin: bool = False
) -> Iterator[_BatchNormCall]:
    """The batch norm calls of the forward in ``graph``, in order.

    In the bodies of some higher-order operators, nodes lack that metadata: with ``without_origin``,
    any subtraction from a layer's output counts.
    """
    for node in graph.nodes:
        if node.target is not aten.sub.Tensor or node in backward:
            continue
        minuend, mean = node.args
        if not same_shape(minuend, node):
            continue
        source = uses.source_of(minuend, casts=True)
        layer, origin = layers.layer_of(source), str(node.meta.get("original_aten", ""))
        is_batch_norm = "batch_norm" in origin and "backward" not in origin
        # Batch statistics are results of ``var_mean`` in decompositions.
        is_result = isinstance(mean, fx.Node) and mean.target is operator.getitem
        trains = is_result and mean.args[0].target is aten.var_mean.correction
        if is_batch_norm or (without_origin and layer is not None):
            yield _BatchNormCall(node, source, layer, tuple(_scales(node, backward)), trains)


def _subgraphs_of(graph: fx.Graph, backward: Collection[fx.Node] = ()) -> Iterator[fx.Graph]:
    """Graphs that ``graph`` hands to higher-order operators of the forward, and those inside."""
    for node in graph.find_nodes(op="get_attr"):
        inner = getattr(graph.owning_module, str(node.target), None)
        if isinstance(inner, fx.GraphModule) and not all(u in backward for u in node.users):
            yield inner.graph
            yield from _subgraphs_of(inner.graph)


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
        elif not (is_shift or uses.is_move(user) or layers.is_cast(user)):
            return
        node = user
