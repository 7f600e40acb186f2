"""Records of what was decided: one for each batch norm call, one for each other scale."""

from torch import fx

from ..._torch import inductor
from ...codes import Code
from ...graph import layers
from ...graph.layers import Layer, bytes_of
from ...graph.provenance import name_of
from ...graph.uses import backward_of, depending_on, is_recomputed
from ...records import Record
from ..decisions import record_of
from .batch_norms import BatchNormCall, find_batch_norms, subgraphs_of
from .decide import Decision

NamedRecord = tuple[str, Record]
"""The name of the node of the layer whose output it is about, "" if none, and the record."""


def account(graph: fx.Graph, decisions: list[Decision]) -> list[NamedRecord]:
    """Records of all decisions about ``graph``; call it before they are applied."""
    if not inductor.is_outermost(graph):
        return []  # accounted for where it is called
    backward = backward_of(graph)
    trained = depending_on([*inductor.trained_inputs(graph)]) if backward else set()
    by_value = {value: d for d in decisions for value in d.candidate.values}
    found: list[NamedRecord] = []
    counted: set[fx.Node | None] = {None}
    for bn in find_batch_norms(graph, backward):
        decision = by_value.get(bn.input)
        layer = bn.layer if decision is None else decision.layer
        code, detail = _code(bn, decision, trained)
        node = None if layer is None else layer.node
        # The output of a layer with several batch norms is not saved twice.
        found.append(_record(layer, code, detail, bn.node, saves=node not in counted))
        counted.add(node)
    scales = (d for d in decisions if d.layer.node not in counted)
    found += [_record(d.layer, d.code, d.detail) for d in scales]
    for inner in subgraphs_of(graph, backward):
        for bn in find_batch_norms(inner, (), without_origin=True):
            code = Code.BATCH_STATISTICS if bn.trains else Code.INSIDE_HIGHER_ORDER_OP
            found.append(_record(bn.layer, code if backward else Code.NO_GRAD, "", bn.node))
    return found


def _code(bn: BatchNormCall, decision: Decision | None, trained: set[fx.Node]) -> tuple[Code, str]:
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
    if layer is not None and saves and code.rewritten and not is_recomputed(layer.node):
        saved = layer.node if code is Code.FUSED else layer.weight
    record = record_of(
        None if layer is None else layer.node,
        at=bn,
        pass_name="scale_gradient",
        kind="batch norm" if bn else "scale",
        code=code,
        detail=detail,
        batch_norm=name_of(bn) if bn else "",
        bytes_saved=bytes_of(saved),
    )
    return (layer.node.name if layer is not None and saves else ""), record
