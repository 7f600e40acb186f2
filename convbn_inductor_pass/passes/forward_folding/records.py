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
    return tuple(map(_record, decisions))


def _record(decision: Decision) -> Record:
    candidate = decision.candidate
    node, out = candidate.layer.node, candidate.layer.out
    bytes_exact, bytes_folded = kernels.bytes_moved(candidate)
    return Record(
        pass_name="forward_folding",
        kind="layer",
        code=decision.code,
        detail=decision.detail,
        layer=name_of(node),
        source=source_line(node),
        output_shape=compat.shape_of(out),
        output_bytes=compat.size_hint(out.numel()) * out.element_size(),
        epilogue=candidate.epilogue,
        kernel=candidate.kernel,
        bytes_exact=bytes_exact,
        bytes_folded=bytes_folded,
    )
