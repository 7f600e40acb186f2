"""What a joint graph uses a value for: which nodes depend on others, and what backward needs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from .._torch import compat

__all__ = [
    "backward_of",
    "depending_on",
    "is_available",
    "is_move",
    "is_recomputed",
    "is_saved",
    "read_by",
    "source_of",
    "users_of",
]


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


def source_of(node: fx.Node) -> fx.Node:
    """What ``node`` is a view or copy of, however deep; itself if it is none."""
    while is_move(node):
        node = node.all_input_nodes[0]
    return node


def users_of(node: fx.Node) -> Iterator[fx.Node]:
    """Users of ``node`` and of its moves."""
    for user in node.users:
        if is_move(user):
            yield from users_of(user)
        else:
            yield user


def read_by(
    node: fx.Node, backward: Collection[fx.Node], besides: Collection[fx.Node] = ()
) -> bool:
    """Whether calls of the backward, besides some, take ``node`` or a view of it.

    A mask is no such call: it depends on no gradient.
    """
    return any(user in backward and user not in besides for user in users_of(node))


def is_recomputed(node: fx.Node) -> bool:
    """Whether activation checkpointing has ``node`` computed again in backward."""
    policies = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)
    return node.meta.get("recompute") in policies


def is_available(
    node: fx.Node, backward: Collection[fx.Node], besides: Collection[fx.Node] = ()
) -> bool:
    """Whether backward has the value anyway, or what it is computed from element by element.

    Then the partitioner can recompute what is pointwise of it, such as its mask.
    """
    seen, pending = {node}, [node]
    while pending:
        node = pending.pop()
        if node.op != "call_function" or is_recomputed(node) or read_by(node, backward, besides):
            continue
        sources = node.all_input_nodes
        if not sources or not (is_move(node) or compat.is_pointwise(node.target)):
            return False
        pending += [n for n in sources if n not in seen]
        seen.update(sources)
    return True


def is_saved(
    node: fx.Node, backward: Collection[fx.Node], besides: Collection[fx.Node] = ()
) -> bool:
    """Whether a value is an output, or needed in backward by a call that is not pointwise.

    The partitioner recomputes pointwise calls. What the calls in ``besides`` need does not count.
    """
    while is_move(node) and node not in backward:
        node = node.all_input_nodes[0]
    return any(
        user.op == "output" or (user in backward and not compat.is_pointwise(user.target))
        for user in users_of(node)
        if user not in besides
    )
