"""Decide about candidates: is folding legal, and does it pay? The first refusal counts."""

import itertools

import torch
from torch import fx

from ..._torch import compat, inductor
from ...codes import Code
from ...config import Options
from ...graph import affine, layers, strides
from ...graph.layers import bytes_of, tensor_of, value_of
from ...graph.uses import depending_on, reachable
from ...records import Record
from ..base import Refusals, denied, record_of
from .find import FoldCandidate, find_candidates


def decide_all(graph: fx.Graph, options: Options) -> list[tuple[FoldCandidate, Record]]:
    """A decision about each layer of ``graph`` that something foldable follows; only reads."""
    return [(candidate, decide(candidate, options)) for candidate in find_candidates(graph)]


def decide(candidate: FoldCandidate, options: Options) -> Record:
    """FOLDED, or the code of the first check that refuses."""
    refusals = itertools.chain(legality(candidate), profit(candidate, options))
    code, detail = next(refusals, (Code.FOLDED, ""))
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


# Folded, a layer for which both move as many bytes came out slower: the scale and the shift are
# small kernels of their own, and the weight is read with less locality.
_MARGIN = 2


def legality(c: FoldCandidate) -> Refusals:
    """Why a result would be wrong, or might be."""
    layer, steps, dtype = c.layer, c.chain.steps, c.layer.out.dtype
    if dtype == torch.float16:
        yield Code.FLOAT16_RANGE, str(layer.node)
    met = [value_of(n).dtype for n in (layer.input, layer.weight, *(s.node for s in steps))]
    if not layers.DTYPES_TOGETHER.get(dtype, set()).issuperset(met):
        yield Code.UNSUPPORTED_DTYPE, " and ".join(map(str, dict.fromkeys((dtype, *met))))
    if _is_quantized(layer.weight):
        yield Code.QUANTIZED, str(layer.weight)
    if not affine.constants_fit(steps):
        yield Code.CONSTANT_RANGE, str(c.chain.last)
    # The new call comes last, and reads what the layer read before the write.
    node = layer.node
    while node is not c.last and not compat.is_mutable(node.target):
        node = node.next
    if node is not c.last:
        yield Code.INPUT_MUTATED, f"between {layer.node} and {c.last}"
    # There the strides of results have to be those that were traced, as cond's branches'.
    if not inductor.is_outermost(layer.node.graph):
        yield Code.INSIDE_HIGHER_ORDER_OP, ""
    # Preserving the strides takes a copy, and Inductor may fail on its symbolic slices (2.13).
    parts = strides.returned_in_parts(layer.node.graph)
    symbolic = [n for n in parts if not all(isinstance(s, int) for s in value_of(n).shape)]
    affected = depending_on([c.end]) if symbolic else set()
    yield from ((Code.VIEW_RETURNED, str(n)) for n in symbolic if n in affected)


def profit(c: FoldCandidate, options: Options) -> Refusals:
    """Why folding is not wanted, or does not pay."""
    by = denied(options, c.layer.node, *(s.node for s in c.chain.steps))
    if by is not None:
        yield Code.DENIED, by
    device = c.layer.out.device.type
    if options.forward == "auto" and device != "cpu":
        yield Code.NOT_MEASURED, device
    exact, folded = bytes_moved(c)
    if options.forward != "fold" and _MARGIN * folded >= exact:
        yield Code.MORE_BYTES, ""


def _is_quantized(weight: fx.Node) -> bool:
    """Whether a weight is made of integers, or 8-bit numbers, of as many as it has."""
    size = value_of(weight).numel()

    def as_large(node: fx.Node) -> list[fx.Node]:
        tensors = ((n, tensor_of(n)) for n in node.all_input_nodes)
        return [n for n, t in tensors if t is not None and layers.known_equal(t.numel(), size)]

    dtypes = (value_of(n).dtype for n in reachable([weight], as_large))
    return any(d.itemsize == 1 or not (d.is_floating_point or d.is_complex) for d in dtypes)


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
