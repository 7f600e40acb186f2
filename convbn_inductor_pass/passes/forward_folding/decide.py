"""Decide about candidates: is folding legal, and does it pay?

Each check is a row of a table: a code, and a function that returns the detail of a refusal, or None
to pass. The first refusal decides.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable

import torch
from torch import fx

from ..._torch import compat, inductor
from ...codes import Code
from ...config import Options
from ...graph import affine, layers, strides
from ...graph.layers import tensor_of, value_of
from ...graph.provenance import module_path
from . import kernels
from .candidate import FoldCandidate

__all__ = ["Context", "Decision", "decide"]


@dataclasses.dataclass(frozen=True)
class Context:
    """What decisions depend on besides the candidate.

    Attributes:
        options: the user's.
        position: of each node in the graph.
        writes: positions of the nodes that write to memory, ascending.
        parts_of_subclasses: nodes that the graph returns inside of tensor subclasses.
        inside_higher_order_op: whether the graph is the body of one.
    """

    options: Options
    position: dict[fx.Node, int]
    writes: list[int]
    parts_of_subclasses: set[fx.Node]
    inside_higher_order_op: bool

    @classmethod
    def of(cls, graph: fx.Graph, options: Options) -> Context:
        position = {node: i for i, node in enumerate(graph.nodes)}
        writes = [position[n] for n in graph.nodes if compat.is_mutable(n.target)]
        parts = inductor.parts_of_subclasses(graph)
        return cls(options, position, writes, parts, not inductor.is_outermost(graph))


@dataclasses.dataclass(frozen=True)
class Decision:
    """What was decided about a candidate; ``detail`` names the nodes that it was about."""

    candidate: FoldCandidate
    code: Code
    detail: str = ""


def decide(candidate: FoldCandidate, context: Context) -> Decision:
    """FOLDED, or the code of the first check that refuses. Changes nothing."""
    for code, check in (*LEGALITY, *PROFIT):
        detail = check(candidate, context)
        if detail is not None:
            return Decision(candidate, code, detail)
    return Decision(candidate, Code.FOLDED)


def _is_float16(c: FoldCandidate, _: Context) -> str | None:
    return str(c.layer.node) if c.layer.out.dtype == torch.float16 else None


# The dtypes that a layer of each dtype may meet in its chain.
_DTYPES = {
    torch.float32: {torch.float32},
    torch.bfloat16: {torch.bfloat16, torch.float32},
    torch.float64: {torch.float64},
}


def _has_other_dtypes(c: FoldCandidate, _: Context) -> str | None:
    dtype = c.layer.out.dtype
    nodes = (c.layer.input, c.layer.weight, *(s.node for s in c.chain.steps))
    met = [value_of(node).dtype for node in nodes]
    if _DTYPES.get(dtype, set()).issuperset(met):
        return None
    return " and ".join(map(str, dict.fromkeys((dtype, *met))))


def _is_quantized(c: FoldCandidate, _: Context) -> str | None:
    """Whether the weight is made of integers, or 8-bit numbers, of as many as it has."""
    size, seen, pending = value_of(c.layer.weight).numel(), {c.layer.weight}, [c.layer.weight]
    while pending:
        node = pending.pop()
        tensor = tensor_of(node)
        if tensor is None or not layers.known_equal(tensor.numel(), size):
            continue
        if tensor.dtype.itemsize == 1 or not (tensor.is_floating_point() or tensor.is_complex()):
            return str(c.layer.weight)
        pending += [n for n in node.all_input_nodes if n not in seen]
        seen.update(node.all_input_nodes)
    return None


def _constants_overflow(c: FoldCandidate, _: Context) -> str | None:
    return None if affine.constants_fit(c.chain) else str(c.chain.last)


def _is_written_between(c: FoldCandidate, context: Context) -> str | None:
    """The new call comes last, and reads what the layer read before the write."""
    first, last = context.position[c.layer.node], context.position[c.last]
    writes = context.writes
    if bisect.bisect_right(writes, first) == bisect.bisect_left(writes, last):
        return None
    return f"between {c.layer.node} and {c.last}"


def _is_inside_higher_order_op(_: FoldCandidate, context: Context) -> str | None:
    """There the strides of results have to be those that were traced, as cond's branches'."""
    return "" if context.inside_higher_order_op else None


def _has_returned_view(c: FoldCandidate, context: Context) -> str | None:
    returned = strides.has_returned_view(c.end, context.parts_of_subclasses)
    return str(c.end) if returned else None


def _has_observed_strides(c: FoldCandidate, _: Context) -> str | None:
    found = [node for node in (c.end, c.last) if strides.is_observed(node)]
    return str(found[0]) if found else None


def _is_denied(c: FoldCandidate, context: Context) -> str | None:
    paths = dict.fromkeys(module_path(n) for n in (c.layer.node, *(s.node for s in c.chain.steps)))
    return None if context.options.allows(*paths) else " and ".join(filter(None, paths))


def _is_not_measured(c: FoldCandidate, context: Context) -> str | None:
    device = c.layer.out.device.type
    return device if context.options.forward == "auto" and device != "cpu" else None


# A layer for which both move as many bytes came out slower when folded: the scale and the shift are
# small kernels of their own, and the weight is read with less locality.
_MARGIN = 2


def _moves_more_bytes(c: FoldCandidate, context: Context) -> str | None:
    exact, folded = kernels.bytes_moved(c)
    return None if context.options.forward == "fold" or _MARGIN * folded < exact else ""


Check = Callable[[FoldCandidate, Context], str | None]

LEGALITY: tuple[tuple[Code, Check], ...] = (
    (Code.FLOAT16_RANGE, _is_float16),
    (Code.UNSUPPORTED_DTYPE, _has_other_dtypes),
    (Code.QUANTIZED, _is_quantized),
    (Code.CONSTANT_RANGE, _constants_overflow),
    (Code.INPUT_MUTATED, _is_written_between),
    (Code.INSIDE_HIGHER_ORDER_OP, _is_inside_higher_order_op),
    (Code.VIEW_RETURNED, _has_returned_view),
    (Code.STRIDES_OBSERVED, _has_observed_strides),
)
"""Checks without which a result would be wrong, or might be."""

PROFIT: tuple[tuple[Code, Check], ...] = (
    (Code.DENIED, _is_denied),
    (Code.NOT_MEASURED, _is_not_measured),
    (Code.MORE_BYTES, _moves_more_bytes),
)
"""Checks of whether folding is wanted, and pays."""
