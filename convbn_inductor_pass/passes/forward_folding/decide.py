"""Decide about candidates: is folding legal, and does it pay? The first row that applies counts."""

import torch
from torch import fx

from ..._torch import compat, inductor
from ...codes import Code
from ...config import Options
from ...graph import affine, layers, strides
from ...graph.layers import bytes_of, tensor_of, value_of
from ...graph.uses import depending_on, reachable
from ...records import Record
from ..base import Row, denied, first_refusal, record_of
from .find import FoldCandidate, find_candidates


def decide_all(graph: fx.Graph, options: Options) -> list[tuple[FoldCandidate, Record]]:
    """A decision about each layer of ``graph`` that something foldable follows; only reads."""
    return [(candidate, decide(candidate, options)) for candidate in find_candidates(graph)]


def decide(candidate: FoldCandidate, options: Options) -> Record:
    """FOLDED, or the code of the first check that refuses."""
    rows = (*LEGALITY, *PROFIT)
    code, detail = first_refusal(rows, candidate, options) or (Code.FOLDED, "")
    bytes_exact, bytes_folded = bytes_moved(candidate)
    return record_of(
        candidate.layer.node,
        pass_name="forward_folding",
        kind="layer",
        code=code,
        detail=detail,
        epilogue="" if candidate.epilogue is None else candidate.epilogue.name,
        kernel=candidate.kernel,
        bytes_exact=bytes_exact,
        bytes_folded=bytes_folded,
    )


def _is_float16(c: FoldCandidate, _: Options) -> str | None:
    return str(c.layer.node) if c.layer.out.dtype == torch.float16 else None


def _has_other_dtypes(c: FoldCandidate, _: Options) -> str | None:
    dtype = c.layer.out.dtype
    nodes = (c.layer.input, c.layer.weight, *(s.node for s in c.chain.steps))
    met = [value_of(node).dtype for node in nodes]
    if layers.DTYPES_TOGETHER.get(dtype, set()).issuperset(met):
        return None
    return " and ".join(map(str, dict.fromkeys((dtype, *met))))


def _is_quantized(c: FoldCandidate, _: Options) -> str | None:
    """Whether the weight is made of integers, or 8-bit numbers, of as many as it has."""
    weight, size = c.layer.weight, value_of(c.layer.weight).numel()

    def as_large(node: fx.Node) -> list[fx.Node]:
        tensors = ((n, tensor_of(n)) for n in node.all_input_nodes)
        return [n for n, t in tensors if t is not None and layers.known_equal(t.numel(), size)]

    dtypes = (value_of(n).dtype for n in reachable([weight], as_large))
    is_quantized = any(d.itemsize == 1 or not (d.is_floating_point or d.is_complex) for d in dtypes)
    return str(weight) if is_quantized else None


def _constants_overflow(c: FoldCandidate, _: Options) -> str | None:
    return None if affine.constants_fit(c.chain.steps) else str(c.chain.last)


def _is_written_between(c: FoldCandidate, _: Options) -> str | None:
    """The new call comes last, and reads what the layer read before the write."""
    node = c.layer.node.next
    while node is not c.last and not compat.is_mutable(node.target):
        node = node.next
    return None if node is c.last else f"between {c.layer.node} and {c.last}"


def _is_inside_higher_order_op(c: FoldCandidate, _: Options) -> str | None:
    """There the strides of results have to be those that were traced, as cond's branches'."""
    return None if inductor.is_outermost(c.layer.node.graph) else ""


def _is_returned_in_symbolic_parts(c: FoldCandidate, _: Options) -> str | None:
    """Preserving the strides takes a copy, and Inductor may fail on its symbolic slices (2.13)."""
    nodes = strides.returned_in_parts(c.layer.node.graph)
    symbolic = {n for n in nodes if not all(isinstance(s, int) for s in value_of(n).shape)}
    return next(map(str, symbolic & depending_on([c.end])), None) if symbolic else None


def _is_denied(c: FoldCandidate, options: Options) -> str | None:
    return denied(options, c.layer.node, *(s.node for s in c.chain.steps))


def _is_not_measured(c: FoldCandidate, options: Options) -> str | None:
    device = c.layer.out.device.type
    return device if options.forward == "auto" and device != "cpu" else None


# Folded, a layer for which both move as many bytes came out slower: the scale and the shift are
# small kernels of their own, and the weight is read with less locality.
_MARGIN = 2


def _moves_more_bytes(c: FoldCandidate, options: Options) -> str | None:
    exact, folded = bytes_moved(c)
    return None if options.forward == "fold" or _MARGIN * folded < exact else ""


def bytes_moved(candidate: FoldCandidate) -> tuple[int, int]:
    """Bytes moved as written and folded, besides the layer's own input and output; an estimate.

    As written, a generated kernel reads the layer's output and writes the result. Folded, it is
    gone if the layer's own computes all of it, and no user of the result is generated, who would
    be computed in the same kernel; instead the weight is read and written once more.
    """
    chain, layer = candidate.chain, candidate.layer
    # On GPUs, Inductor takes a bias off the convolution and into a generated kernel.
    has_bias = layer.bias is not None or any(s.kind == "shift" for s in chain.steps)
    adds_bias_apart = layer.is_conv and has_bias and layer.out.device.type != "cpu"
    users = chain.last.users
    is_stored = any(u.op == "output" or not inductor.is_generated(u.target) for u in users)
    kernel_goes = candidate.epilogue is not None or (is_stored and not adds_bias_apart)
    # A weight that autocast casts down is read and written anyway, in the same kernel.
    scales = any(s.kind in ("scale", "divide") and s.operand != 1 for s in chain.steps)
    reads_weight = scales and layers.without_casts(layer.weight) is layer.weight
    return 2 * kernel_goes * bytes_of(layer.node), 2 * reads_weight * bytes_of(layer.weight)


# Without these a result would be wrong, or might be.
LEGALITY: tuple[Row, ...] = (
    (Code.FLOAT16_RANGE, _is_float16),
    (Code.UNSUPPORTED_DTYPE, _has_other_dtypes),
    (Code.QUANTIZED, _is_quantized),
    (Code.CONSTANT_RANGE, _constants_overflow),
    (Code.INPUT_MUTATED, _is_written_between),
    (Code.INSIDE_HIGHER_ORDER_OP, _is_inside_higher_order_op),
    (Code.VIEW_RETURNED, _is_returned_in_symbolic_parts),
)

# Whether folding is wanted, and pays.
PROFIT: tuple[Row, ...] = (
    (Code.DENIED, _is_denied),
    (Code.NOT_MEASURED, _is_not_measured),
    (Code.MORE_BYTES, _moves_more_bytes),
)
