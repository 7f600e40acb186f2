"""Why a layer's output is saved for backward although no sum over it is left.

The partitioner saves as few bytes as it can and recomputes pointwise calls. Its decision is not
known here; what is said here is the usual outcome.
"""

from torch import fx

from ..._torch import compat
from ...graph.layers import numel_of, tensor_of
from ...graph.uses import is_move, is_saved, is_saved_by_policy, users_of
from .find import Candidate
from .match import Match


def saved_by(candidate: Candidate, match: Match, backward: set[fx.Node]) -> str | None:
    """What the layer's output is saved for, though it is not summed over.

    The policy of a selective checkpoint; a library call that needs the output itself, or what is
    summed over; or a pointwise call on a value that would be recomputed from the output, that is,
    one that is computed from it alone, element by element, and not from something that is saved
    for another reason.
    """
    layer = candidate.layer
    if is_saved_by_policy(layer.node):
        return "a checkpoint's policy"
    reasons = []
    for r in match.reductions:
        computing = (layer.node, *(s.node for s in r.affine.steps))  # what it sums
        users = (u for n in computing for u in users_of(n) if u in backward)
        reasons.append(next((u for u in users if not compat.is_pointwise(u.target)), None))
    if all(reasons):
        return str(reasons[0])
    products = {r.product for r in match.reductions}
    size = numel_of(layer.node)
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
                    return str(user)
                continue
            others = [n for n in user.all_input_nodes if n not in seen]
            if tensor.dtype.is_floating_point and not any(numel_of(n) >= size for n in others):
                seen.add(user)
                if not is_saved(user, backward):
                    pending.append(user)
    return None
