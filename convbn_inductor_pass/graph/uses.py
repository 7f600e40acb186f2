"""What a graph uses values for: which nodes depend on others, and what backward needs."""

from collections.abc import Callable, Collection, Iterable, Iterator

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from .._torch import compat
from . import layers


def reachable(
    nodes: Iterable[fx.Node], following: Callable[[fx.Node], Iterable[fx.Node]]
) -> Iterator[fx.Node]:
    """``nodes``, what comes ``following`` each, and so on: each once, the nearest first."""
    seen = dict.fromkeys(nodes)
    pending = [*seen]
    for node in pending:  # grows
        yield node
        new = dict.fromkeys(n for n in following(node) if n not in seen)
        seen.update(new)
        pending += new


def depending_on(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """``nodes`` and all that is computed from them."""
    return {*reachable(nodes, lambda n: n.users)}


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


def users_of(node: fx.Node, through: Callable[[fx.Node], object] = is_move) -> Iterator[fx.Node]:
    """Users of ``node`` and of its moves, or of what else is looked ``through``."""
    for user in node.users:
        if through(user):
            yield from users_of(user, through)
        else:
            yield user


def is_recomputed(node: fx.Node) -> bool:
    """Whether activation checkpointing has ``node`` computed again in backward."""
    policies = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)
    return node.meta.get("recompute") in policies


def is_saved(node: fx.Node, backward: Collection[fx.Node]) -> bool:
    """Whether a value is an output, or backward needs it for more than can be recomputed."""
    return any(
        user.op == "output" or (user in backward and not compat.is_pointwise(user.target))
        for user in users_of(source_of(node))
    )
