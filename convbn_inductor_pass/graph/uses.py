"""What a joint graph uses a value for: which nodes depend on others, and what backward needs."""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy

from .._torch import compat
from . import layers


def depending_on(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """``nodes`` and all that is computed from them."""
    found, pending = set(nodes), list(nodes)
    while pending:
        new = [u for u in pending.pop().users if u not in found]
        found.update(new)
        pending += new
    return found


def backward_of(graph: fx.Graph) -> set[fx.Node]:
    """What depends on a gradient of an output; empty for a graph without a backward."""
    inputs = graph.find_nodes(op="placeholder")
    return depending_on([n for n in inputs if n.name.startswith("tangents_")])


def is_move(node: fx.Node) -> bool:
    """Whether ``node`` only holds the elements of its input in another place."""
    return compat.is_view(node.target) or node.target is torch.ops.aten.clone.default


def source_of(node: fx.Node, *, casts: bool = False) -> fx.Node:
    """What ``node`` is a view or copy of (or a cast), however deep; itself if it is none."""
    while is_move(node) or (casts and layers.is_cast(node)):
        node = node.all_input_nodes[0]
    return node


def users_of(node: fx.Node) -> Iterator[fx.Node]:
    """Users of ``node`` and of its moves."""
    for user in node.users:
        if is_move(user):
            yield from users_of(user)
        else:
            yield user


def read_in_backward(
    node: fx.Node, forward: Collection[fx.Node], besides: Collection[fx.Node] = ()
) -> bool:
    """Whether calls that the forward does not need take ``node``, a view or a cast of it.

    Masks do not count, and calls in ``besides`` neither.
    """
    for user in node.users:
        if user in besides or user.op != "call_function":
            continue
        if is_move(user) or layers.is_cast(user):  # in the forward, too: it may be read after that
            if read_in_backward(user, forward, besides):
                return True
        elif user not in forward:
            result = user.meta.get("val")
            is_mask = isinstance(result, Tensor) and result.dtype == torch.bool
            if not is_mask and not isinstance(result, (int, torch.SymInt)):  # which is a size
                return True
    return False


def is_recomputed(node: fx.Node) -> bool:
    """Whether activation checkpointing has ``node`` computed again in backward."""
    policies = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)
    return node.meta.get("recompute") in policies


def is_saved_by_policy(node: fx.Node) -> bool:
    """Whether selective activation checkpointing has ``node`` saved, needed or not."""
    return node.meta.get("recompute") == CheckpointPolicy.MUST_SAVE


def is_available(
    node: fx.Node, forward: Collection[fx.Node], besides: Collection[fx.Node] = ()
) -> bool:
    """Whether backward has the value anyway, or what it is computed from element by element.

    Then the partitioner can recompute what is pointwise of it, such as its mask.
    """
    seen, pending = {node}, [node]
    while pending:
        node = pending.pop()
        if node.op != "call_function" or is_recomputed(node):
            continue
        if read_in_backward(node, forward, besides):
            continue
        sources = node.all_input_nodes
        if not sources or not (is_move(node) or compat.is_pointwise(node.target)):
            return False
        pending += [n for n in sources if n not in seen]
        seen.update(sources)
    return True


def is_saved(node: fx.Node, backward: Collection[fx.Node]) -> bool:
    """Whether a value is an output, or needed in backward by a call that is not pointwise.

    The partitioner recomputes pointwise calls.
    """
    return any(
        user.op == "output" or (user in backward and not compat.is_pointwise(user.target))
        for user in users_of(source_of(node))
    )
