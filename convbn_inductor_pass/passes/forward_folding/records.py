"""Records of the decisions about a graph's layers."""

from __future__ import annotations

from collections.abc import Iterable

from ..._torch import compat
from ...graph.provenance import name_of, source_line
from ...records import Record
from . import kernels
from .decide import Decision

__all__ = ["records_of"]


def records_of(decisions: Iterable[Decision]) -> tuple[Record, ...]:
    """A record for each decision; call it before the graph is rewritten."""
    records = []
    for decision in decisions:
        candidate, layer = decision.candidate, decision.candidate.layer
        bytes_exact, bytes_folded = kernels.bytes_moved(candidate)
        record = Record(
            pass_name="forward_folding",
            kind="layer",
            code=decision.code,
            detail=decision.detail,
            layer=name_of(layer.node),
            source=source_line(layer.node),
            output_shape=compat.shape_of(layer.out),
            output_bytes=compat.size_hint(layer.out.numel()) * layer.out.element_size(),
            epilogue=candidate.epilogue,
            kernel=candidate.kernel,
            bytes_exact=bytes_exact,
            bytes_folded=bytes_folded,
        )
        records.append(record)
    return tuple(records)
