"""Gradients of trainable scales from the weight gradient of the layer before them.

Before, in the backward of ``y = A * conv(x, W, b) + B`` whose scale A is trained, one number per
channel in any spelling (a layer scale, a batch norm written by hand):

    dA = sum(g * c)                       keeps the layer's output c = conv(x, W, b)
    dx, dW, db = layer_backward(S * g, x, W)

After, with ``sum(g) = sum of g over all but channels``:

    dx, dWg = layer_backward(g, x, S * W)         dW = S * dWg    db = S * sum(g)
    sum(g * c) = <dWg, W> + b * sum(g)            c is not kept

This is tune mode's gradient (``autograd``) for what is no batch norm to PyTorch. The graph is the
joint one, of forward and backward in aten IR, in which nothing is written to and nothing aliases.
What is rewritten is proven from the graph alone and owes nothing to how autograd made it:

* ``u = A * c + B``, a chain of steps that are affine per channel, read as for the kernel half;
* ``h = T * g`` and ``dc = S * g`` with one ``g``: scalings per channel, casts, and moves;
* in ``h * u`` each number of ``g`` meets that of ``c`` which it meets in the product that makes
  the weight gradient: moves are compared, see :func:`scale_sums.arrangement`;
* ``sum(h * u)`` goes over all but the channels, or all. For each channel it is
  ``T * (A * sum(g * c) + B * sum(g))``.

The forward's nodes stay. :mod:`scale_sums` finds, this file decides, :mod:`scales_rewrite`
rewrites.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from GONE.decide import WEIGHT_PASSES
from torch import fx

from ..._torch import compat
from ...codes import ScaleCode
from ...config import Options
from ...graph import affine, layers
from ...graph.affine import AffineChain
from ...graph.layers import Layer, tensor_of
from ...graph.provenance import layer_path, module_path
from .find import (
    Path,
    Reduction,
    WeightGradient,
    affine_values,
    arrangement,
    depending_on,
    reductions_of,
    scalings_to,
    weight_gradients,
)

__all__ = ["ScaleDecision", "analyze"]

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class ScaleDecision:
    """What was decided about the sums over one layer's output in backward.

    Attributes:
        g: the node that ``dc`` and the ``h`` of each sum are scalings of; None if there is none.
        scaling: how ``dc`` is computed from ``g``; its ``dim`` is that of ``dc``.
        scalings: the same for the ``h`` of each of ``reductions``.
        g_dim: the dimension of ``g`` that is the channels.
    """

    layer: Layer
    code: ScaleCode
    detail: str = ""
    reductions: tuple[Reduction, ...] = ()
    gradient: WeightGradient | None = None
    g: fx.Node | None = None
    g_dim: int = 1
    scaling: Path = dataclasses.field(default_factory=lambda: Path(1))
    scalings: tuple[Path, ...] = ()


def analyze(graph: fx.Graph, options: Options) -> list[ScaleDecision]:
    """Decide about every layer of a joint graph whose output backward sums over; only reads."""
    inputs = graph.find_nodes(op="placeholder")
    backward = depending_on([n for n in inputs if n.name.startswith("tangents_")])
    if not backward:
        return []
    written = depending_on(_written_inputs(graph))
    decisions: list[ScaleDecision] = []
    claimed: set[fx.Node] = set()
    for node in graph.nodes:
        layer = None if node in backward else layers.layer_of(node)
        if layer is None:
            continue
        values = affine_values(layer, backward)
        reductions = tuple(reductions_of(values, backward))
        if reductions:
            decision = _decide(layer, values, reductions, backward, claimed, written, options)
            decisions.append(decision)
            if decision.gradient is not None and decision.code.rewritten:
                claimed.add(decision.gradient.node)
    return decisions


def _written_inputs(graph: fx.Graph) -> list[fx.Node]:
    """Inputs of the graph that it writes to, as AOTAutograd does at a graph's end."""
    writes = [n for n in graph.nodes if n.op == "call_function" and compat.is_mutable(n.target)]
    return [i for n in writes for i in n.all_input_nodes if i.op == "placeholder"]


def _decide(
    layer: Layer,
    values: dict[fx.Node, Path],
    reductions: tuple[Reduction, ...],
    backward: set[fx.Node],
    claimed: set[fx.Node],
    written: set[fx.Node],
    options: Options,
) -> ScaleDecision:
    whole = ScaleDecision(layer, ScaleCode.REWRITTEN, "", reductions)

    def no(code: ScaleCode, detail: str = "") -> ScaleDecision:
        return dataclasses.replace(whole, code=code, detail=detail)

    steps = (s.node for r in reductions for s in r.affine.steps)
    paths = (layer_path(layer.node), *map(module_path, steps))
    if not options.permits(*paths):
        return no(ScaleCode.DENIED, " and ".join(filter(None, dict.fromkeys(paths))))
    gradients = [
        g
        for g in weight_gradients(layer, backward, frozen=options.fuse_frozen_layers)
        if g.node not in claimed
    ]
    if not gradients:
        return no(ScaleCode.LAYER_FROZEN)
    matches = [m for g in gradients if (m := _match(whole, g, backward)) is not None]
    if not matches:
        return no(ScaleCode.OTHER_GRADIENT, str(layer.node))
    whole = max(matches, key=lambda m: len(m.reductions))
    needed = _needed_anyway(whole, values, backward)
    if needed is not None:
        return no(ScaleCode.NEEDED_ANYWAY, f"by {needed}")
    if (used := _dtypes(whole)) - _DTYPES.get(layer.out.dtype, set()):
        code = ScaleCode.UNSUPPORTED_DTYPE
        if layer.out.dtype == torch.float16:
            code = ScaleCode.FLOAT16_RANGE
        return no(code, ", ".join(sorted(map(str, used))))
    scalings = (whole.scaling, *whole.scalings, *(r.affine for r in whole.reductions))
    if not all(affine.numbers_fit(AffineChain(layer, p.steps)) for p in scalings):
        return no(ScaleCode.NUMBER_RANGE)
    operands = [s.operand.node for p in scalings for s in p.steps if s.operand is not None]
    if any(n in written for n in (layer.weight, layer.bias, *operands)):
        return no(ScaleCode.WRITTEN)
    weight = tensor_of(layer.weight)
    sizes = [0 if t is None else compat.size_hint(t.numel()) for t in (weight, layer.out)]
    if sizes[0] > sizes[1] and _source(layer.weight).op != "placeholder":
        return no(ScaleCode.WEIGHT_COMPUTED, str(layer.weight))
    if options.objective == "speed" and WEIGHT_PASSES * sizes[0] > sizes[1]:
        return no(ScaleCode.LARGE_WEIGHT, f"{sizes[0]} numbers against {sizes[1]}")
    return whole


# What a layer's dtype may meet: in half precision, numbers per channel are float32 at most.
_DTYPES = {
    torch.float32: {torch.float32},
    torch.bfloat16: {torch.bfloat16, torch.float32},
    torch.float64: {torch.float64},
}


def _dtypes(decision: ScaleDecision) -> set[torch.dtype]:
    layer = decision.layer
    paths = (decision.scaling, *decision.scalings, *(r.affine for r in decision.reductions))
    nodes = [layer.node, layer.input, layer.weight, decision.g]
    nodes += [n for r in decision.reductions for n in (r.product, r.node)]
    for step in (s for p in paths for s in p.steps):
        nodes.append(step.node)
        if step.reads_a_tensor:
            nodes.append(step.operand.node)  # type: ignore[union-attr]
    return {t.dtype for t in map(tensor_of, nodes) if t is not None}


def _source(node: fx.Node) -> fx.Node:
    """The tensor of which ``node`` is a view or a cast."""
    while layers.is_cast(node) or compat.is_view(node.target):
        node = node.all_input_nodes[0]
    return node


def _match(
    whole: ScaleDecision, gradient: WeightGradient, backward: set[fx.Node]
) -> ScaleDecision | None:
    """``whole`` with those reductions that are over scalings of what ``gradient`` is a scaling of.

    None if there is no such reduction.
    """
    layer = whole.layer
    to_dc = scalings_to(gradient.dc, layer.dim, backward)
    matched = []
    for r in whole.reductions:
        to_h = scalings_to(r.h, r.affine.dim, backward)
        common = [
            n
            for n, path in to_h.items()
            if n in to_dc
            and path.dim == to_dc[n].dim
            and arrangement(to_dc[n], r.affine) == arrangement(path)
        ]
        if common:
            matched.append((r, to_h, common))
    order = list(to_dc)  # from dc up
    for g in order:
        if matched and all(g in common for _, _, common in matched):
            return dataclasses.replace(
                whole,
                reductions=tuple(r for r, _, _ in matched),
                gradient=gradient,
                g=g,
                g_dim=to_dc[g].dim,
                scaling=to_dc[g],
                scalings=tuple(to_h[g] for _, to_h, _ in matched),
            )
    return None


def _needed_anyway(
    decision: ScaleDecision, values: dict[fx.Node, Path], backward: set[fx.Node]
) -> fx.Node | None:
    """A call for which the layer's output is kept for backward, though it is not summed over.

    Either one that needs the output itself, or what the sum is over, and is computed by a library;
    or a pointwise one of what would be recomputed from the output: computed from it alone number by
    number, and not from something that is kept for a reason of its own.
    """
    reasons = [_library_call(r, decision.layer, backward) for r in decision.reductions]
    if all(reasons):
        return reasons[0]
    products = {r.product for r in decision.reductions}
    size = compat.size_hint(decision.layer.out.numel())
    seen = set(values)
    pending = [n for n in values if not _is_kept(n, backward)]
    while pending:
        for user in pending.pop().users:
            tensor = tensor_of(user)
            if user in seen or user in products or tensor is None:
                continue
            if not (_is_move(user) or compat.is_pointwise(user.target)):
                continue
            if user in backward:
                if not _is_move(user):
                    return user
                continue
            others = [n for n in user.all_input_nodes if n not in seen]
            if tensor.dtype.is_floating_point and not any(_is_large(n, size) for n in others):
                seen.add(user)
                if not _is_kept(user, backward):
                    pending.append(user)
    return None


def _library_call(reduction: Reduction, layer: Layer, backward: set[fx.Node]) -> fx.Node | None:
    """A call in backward that is not pointwise and takes something from which ``u`` is computed."""
    for node in (layer.node, *(s.node for s in reduction.affine.steps)):
        for user in _users(node):
            if user in backward and not compat.is_pointwise(user.target):
                return user
    return None


def _is_kept(node: fx.Node, backward: set[fx.Node]) -> bool:
    """Whether a value is an output, or needed in backward by a call that is not pointwise."""
    while _is_move(node) and node not in backward:
        node = node.all_input_nodes[0]
    return any(
        user.op == "output" or (user in backward and not compat.is_pointwise(user.target))
        for user in _users(node)
    )


def _is_move(node: fx.Node) -> bool:
    return compat.is_view(node.target) or node.target is aten.clone.default


def _users(node: fx.Node) -> Iterator[fx.Node]:
    """Users of ``node`` and of what only holds its numbers in another place."""
    for user in node.users:
        if _is_move(user):
            yield from _users(user)
        else:
            yield user


def _is_large(node: fx.Node, size: int) -> bool:
    tensor = tensor_of(node)
    return tensor is not None and compat.size_hint(tensor.numel()) >= size
