"""Records of what was decided: one for each batch norm call, one for each other scale."""

import dataclasses

from torch import fx

from ..._torch import inductor
from ...codes import Code
from ...graph import layers
from ...graph.layers import Layer, bytes_of
from ...graph.provenance import name_of
from ...graph.uses import backward_of, depending_on, is_recomputed
from ...records import Kind, Record
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
    of_batch_norms: set[fx.Node] = set()
    for bn in find_batch_norms(graph, backward):
        decision = by_value.get(bn.input)
        layer = bn.layer if decision is None else decision.layer
        code, detail = _code(bn, decision, trained)
        name, record = _record("batch norm", layer, code, detail, bn.node)
        if decision is not None and decision.layer.node in of_batch_norms:
            # Another batch norm of the same layer, whose output is not saved twice.
            name, record = "", dataclasses.replace(record, bytes_saved=0)
        found.append((name, record))
        if decision is not None:
            of_batch_norms.add(decision.layer.node)
    found += [
        _record("scale", d.layer, d.code, d.detail, d.layer.node)
        for d in decisions
        if d.layer.node not in of_batch_norms
    ]
    for inner in subgraphs_of(graph, backward):
        for bn in find_batch_norms(inner, (), without_origin=True):
            code = Code.BATCH_STATISTICS if bn.trains else Code.INSIDE_HIGHER_ORDER_OP
            code = code if backward else Code.NO_GRAD
            found.append(_record("batch norm", bn.layer, code, "", bn.node))
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


def _record(kind: Kind, layer: Layer | None, code: Code, detail: str, at: fx.Node) -> NamedRecord:
    saved = None
    if layer is not None and code.rewritten and not is_recomputed(layer.node):
        saved = layer.node if code is Code.FUSED else layer.weight
    record = record_of(
        None if layer is None else layer.node,
        at=at,
        pass_name="scale_gradient",
        kind=kind,
        code=code,
        detail=detail,
        batch_norm=name_of(at) if kind == "batch norm" else "",
        bytes_saved=bytes_of(saved),
    )
    return ("" if layer is None else layer.node.name), record
