"""For what a layer's output is saved for backward though no sum over it is left.

The partitioner saves as few bytes as it can and recomputes pointwise calls. Its decision is not
known here; what is said here is the usual outcome.
"""

from __future__ import annotations

from torch import fx

from ..._torch import compat
from ...graph.layers import Layer, tensor_of
from ...graph.uses import is_move, is_saved, users_of
from .find import Candidate, Reduction, is_large
from .match import Match

__all__ = ["saved_by"]


def saved_by(candidate: Candidate, match: Match, backward: set[fx.Node]) -> fx.Node | None:
    """A call for which the layer's output is saved, though it is not summed over.

    Either one that needs the output itself, or what the sum is over, and is computed by a library;
    or a pointwise one of what would be recomputed from the output: computed from it alone element
    by element, and not from something that is saved for a reason of its own.
    """
    layer = candidate.layer
    reasons = [_library_call(r, layer, backward) for r in match.reductions]
    if all(reasons):
        return reasons[0]
    products = {r.product for r in match.reductions}
    size = compat.size_hint(layer.out.numel())
    seen = set(candidate.values)
    pending = [n for n in seen if not is_saved(n, backward)]
    while pending:
        for user in pending.pop().users:
            tensor = tensor_of(user)
            if user in seen or user in products or tensor is None:
                continue
            if not (is_move(user) or compat.is_pointwise(user.target)):
                continue
            if user in backward:
                if not is_move(user):
                    return user
                continue
            others = [n for n in user.all_input_nodes if n not in seen]
            if tensor.dtype.is_floating_point and not any(is_large(n, size) for n in others):
                seen.add(user)
                if not is_saved(user, backward):
                    pending.append(user)
    return None


def _library_call(reduction: Reduction, layer: Layer, backward: set[fx.Node]) -> fx.Node | None:
    """A call in backward that is not pointwise and takes something from which ``u`` is computed."""
    for node in (layer.node, *(s.node for s in reduction.affine.steps)):
        for user in users_of(node):
            if user in backward and not compat.is_pointwise(user.target):
                return user
    return None
