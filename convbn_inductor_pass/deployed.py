"""Deploy mode in Dynamo's graph: a reference to compare tune mode's bytes with.

Each layer followed by an eval-mode batch norm becomes one layer with a bias: only shapes matter.
"""

from typing import Any

from torch import fx, nn

from .eager.calls import LAYERS, BatchNormCall

# What may be between the two: it moves elements, or does nothing in eval mode.
_BETWEEN = {"flatten", "reshape", "view", "contiguous", "to", "dropout", "dropout2d"}


def merge_pairs(graph: fx.Graph) -> None:
    """Merge the pairs of a graph in torch IR in place."""
    for norm in list(graph.nodes):
        if norm.target is not nn.functional.batch_norm:
            continue
        bn = BatchNormCall(*norm.args, **norm.kwargs)
        layer = None if bn.batch_statistics else _layer_before(bn.input, norm)
        if layer is None:
            continue
        bias = bn.running_mean if bn.bias is None else bn.bias
        if len(layer.args) > 2:
            layer.update_arg(2, layer.args[2] or bias)
        else:
            layer.update_kwarg("bias", layer.kwargs.get("bias") or bias)
        norm.replace_all_uses_with(bn.input)
        graph.erase_node(norm)


def _layer_before(node: Any, user: fx.Node) -> fx.Node | None:
    """The layer whose output reaches ``user`` and nothing else that computes with it."""
    while isinstance(node, fx.Node) and all(u is user or _asks_shape(u, node) for u in node.users):
        if node.target in LAYERS:
            return node
        if _name(node) not in _BETWEEN:
            return None
        node, user = node.args[0], node
    return None


def _asks_shape(user: fx.Node, of: fx.Node) -> bool:
    as_other = _name(user) in ("reshape_as", "view_as") and user.args[0] is not of
    return as_other or _name(user) in ("size", "dim")


def _name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    return getattr(node.target, "__name__", "")
