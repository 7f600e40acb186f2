"""Decide where gradients of per-channel scales are taken from a weight gradient.

Before, in the backward of ``y = A * conv(x, W, b) + B`` whose scale A, one value per channel, is
trained (a batch norm in eval mode in any spelling, a layer scale):

    dA = sum(g * c)                               saves the layer's output c = conv(x, W, b)
    dx, dW, db = layer_backward(S * g, x, W)

After, with sums over all but the channels (source: arXiv 2305.11624, section 3):

    dx, dWg = layer_backward(g, x, S * W)         dW = S * dWg    db = S * sum(g)
    sum(g * c) = <dWg, W> + b * sum(g)            c is not saved

What is rewritten is proven from the joint graph alone (:mod:`find` reads it):

* ``u = A * c + B``, a chain of steps that are affine per channel;
* ``h = T * g`` and ``dc = S * g`` with one ``g``: scalings per channel, casts, and moves;
* in ``h * u`` each element of ``g`` meets that of ``c`` which it meets in the product that makes
  the weight gradient: moves are compared, see :func:`find.arrangement`;
* ``sum(h * u)``, for each channel ``T * (A * sum(g * c) + B * sum(g))``, or the sum of these.

Nothing is divided by a scale. The forward's nodes stay, so that its bits are eval mode's. Declines
for the reasons in :func:`legality` and :func:`profit`.
"""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ..._torch import compat, inductor
from ...codes import Code
from ...config import Options
from ...graph import affine, layers, uses
from ...graph.layers import Layer, numel_of, tensor_of
from ..base import Refusals, denied
from .find import Candidate, Match, find_candidates, match_sums, weight_gradients


class Decision(NamedTuple):
    """What was decided about the sums over one layer's output; ``match`` is to be rewritten."""

    candidate: Candidate
    code: Code
    detail: str = ""
    match: Match | None = None


@dataclasses.dataclass(frozen=True)
class _Site:
    """A candidate, and what the reasons to refuse need to know.

    ``trained`` is what depends on an input that has a gradient, ``written`` what depends on one
    that is written to, ``claimed`` are the weight gradients of decisions before.
    """

    candidate: Candidate
    options: Options
    backward: set[fx.Node]
    trained: set[fx.Node]
    written: set[fx.Node]
    claimed: set[fx.Node]

    @property
    def layer(self) -> Layer:
        return self.candidate.layer

    @functools.cached_property
    def matches(self) -> list[Match]:
        frozen = self.layer.weight not in self.trained
        gradients = weight_gradients(self.candidate, self.backward, frozen=frozen)
        free = (g for g in gradients if g.node not in self.claimed)
        matches = (match_sums(self.candidate, g, self.backward) for g in free)
        return [m for m in matches if m is not None]

    @property
    def match(self) -> Match:
        """The match of most sums, with a weight gradient that is wanted anyway if there is one."""
        return max(self.matches, key=lambda m: (m.gradient.wanted, len(m.reductions)))

    @functools.cached_property
    def saved_by(self) -> str | None:
        """What the layer's output is saved for anyway, as the partitioner usually decides later.

        The policy of a selective checkpoint; a library call that needs the output itself, or what
        is summed over; or a pointwise call on a value that would be recomputed from the output: one
        computed from it alone, element by element, and not from what is saved for another reason.
        """
        node, backward, sums = self.layer.node, self.backward, self.match.reductions
        if node.meta.get("recompute") == CheckpointPolicy.MUST_SAVE:
            return "a checkpoint's policy"
        reasons = []
        for r in sums:
            computing = (node, *(s.node for s in r.affine.steps))  # what it sums
            users = (u for n in computing for u in uses.users_of(n) if u in backward)
            reasons.append(next((u for u in users if not compat.is_pointwise(u.target)), None))
        if all(reasons):
            return str(reasons[0])
        seen = {*self.candidate.values, *(r.product for r in sums)}
        pending = [n for n in self.candidate.values if not uses.is_saved(n, backward)]
        for user in (u for n in pending for u in n.users if u not in seen):  # grows
            tensor, is_move = tensor_of(user), uses.is_move(user)
            if tensor is None or not (is_move or compat.is_pointwise(user.target)):
                continue
            if user in backward:
                if not is_move:
                    return str(user)
                continue
            others = (numel_of(n) for n in user.all_input_nodes if n not in seen)
            if tensor.dtype.is_floating_point and not any(n >= numel_of(node) for n in others):
                seen.add(user)
                if not uses.is_saved(user, backward):
                    pending.append(user)
        return None


def decide(graph: fx.Graph, options: Options) -> list[Decision]:
    """Decide about every layer of a joint graph whose output backward sums over; only reads."""
    backward = uses.backward_of(graph)
    if not backward:
        return []
    trained = uses.depending_on([*inductor.trained_inputs(graph)])
    written = uses.depending_on([*inductor.written_inputs(graph)])
    decisions: list[Decision] = []
    claimed: set[fx.Node] = set()
    for candidate in find_candidates(graph, backward):
        site = _Site(candidate, options, backward, trained, written, claimed)
        refusals = itertools.chain(legality(site), profit(site))
        code, detail = next(refusals, (Code.FUSED, ""))
        if code is Code.FUSED and site.saved_by:
            code, detail = Code.WEIGHT_COPY, f"by {site.saved_by}"
        match = site.match if code.rewritten else None
        decisions.append(Decision(candidate, code, detail, match))
        if match is not None and match.gradient.node is not None:
            claimed.add(match.gradient.node)
    return decisions


# What backward reads and writes of a weight's size, in weights: reads W, writes W'; reads dW'
# and W, writes dW. It spares reading the layer's output once.
_WEIGHT_PASSES = 5


def legality(s: _Site) -> Refusals:
    """Why a result would be wrong, or might be."""
    layer = s.layer
    yield from _written(s, layer.input, layer.weight, layer.bias)
    if not s.matches:
        yield Code.OTHER_GRADIENT, str(layer.node)
    match = s.match
    nodes: list[Any] = [layer.node, layer.input, layer.weight, match.g]
    nodes += [n for r in match.reductions for n in (r.product, r.node)]
    nodes += [n for step in match.steps for n in (step.node, step.operand)]
    used = dict.fromkeys(t.dtype for t in map(tensor_of, nodes) if t is not None)
    if not used.keys() <= layers.DTYPES_TOGETHER.get(layer.out.dtype, set()):
        met = ", ".join(map(str, used))
        yield Code.UNSUPPORTED_DTYPE, f"{layer.node} computes in {layer.out.dtype}; used with {met}"
    if not affine.constants_fit(match.steps):
        yield Code.CONSTANT_RANGE, str(layer.node)
    yield from _written(s, *(step.operand for step in match.steps))


def profit(s: _Site) -> Refusals:
    """Why rewriting is not wanted, or does not pay."""
    layer, options = s.layer, s.options
    steps = (step.node for r in s.match.reductions for step in r.affine.steps)
    by = denied(options, layer.node, *steps)
    if by is not None:
        yield Code.DENIED, by
    if not (options.fuse_frozen_layers or s.match.gradient.wanted):
        yield Code.LAYER_FROZEN, f"weight of {layer.node}"
    if s.saved_by and not _copies_weight(s):
        yield Code.SAVED_ANYWAY, f"by {s.saved_by}"
    weight, out = numel_of(layer.weight), numel_of(layer.node)
    if weight > out and uses.source_of(layer.weight, casts=True).op != "placeholder":
        yield Code.WEIGHT_COMPUTED, str(layer.weight)
    if options.objective == "speed" and _WEIGHT_PASSES * weight > out:
        yield Code.LARGE_WEIGHT, f"{weight} elements against {out}"


def _written(s: _Site, *nodes: object) -> Refusals:
    for node in nodes:
        if node in s.written:
            yield Code.INPUT_MUTATED, f"{node} is, or is computed from, what is written to"


def _copies_weight(s: _Site) -> bool:
    """Whether backward takes a copy of the weight in half precision, as autocast makes it.

    The partitioner saves that copy. The scaled weight is recomputed from the parameter.
    """
    weight = uses.source_of(s.layer.weight)
    is_copy = layers.without_casts(weight) is not weight
    used = any(user in s.backward for user in uses.users_of(weight))
    return is_copy and used and s.options.objective == "memory"
