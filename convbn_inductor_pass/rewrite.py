"""Replace a layer and its batch norm by one call with tune mode's gradient.

Before:  c = conv(x, W, b);  y = batch_norm(c, mean, var, gamma, beta, training=False)
After:   y = conv_bn_eval(x, W, b, gamma, beta, mean, var, eps, ...)

The new call stands where the batch norm stood. A rewrite cannot refuse: everything that could
speak against it has been decided before.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from . import autograd
from .decide import Decision
from .origin import note_layer
from .torch_ir import ModuleTensor, Operand, tensor_of

__all__ = ["rewrite"]


def rewrite(decision: Decision) -> fx.Node:
    """Rewrite the pair of a decision to fuse; returns the new node.

    If this raises, the graph is as it was. Rewrite the pairs of a graph from last to first:
    a pair's input may be the result of an earlier pair.
    """
    layer, bn = decision.pair
    graph = bn.node.graph
    new_nodes: list[fx.Node] = []

    def node_of(operand: Operand) -> fx.Node | None:
        if isinstance(operand, ModuleTensor):
            new_nodes.append(graph.get_attr(operand.path))
            return new_nodes[-1]
        return operand

    try:
        with graph.inserting_before(bn.node):
            tensors = tuple(
                node_of(operand)
                for operand in (
                    layer.input,
                    layer.weight,
                    layer.bias,
                    bn.weight,
                    bn.bias,
                    bn.running_mean,
                    bn.running_var,
                )
            )
            target: Any = autograd.linear_bn_eval
            rest: tuple[Any, ...] = ()
            if not layer.is_linear:
                target = autograd.conv_bn_eval
                rest = (
                    layer.stride,
                    layer.padding,
                    layer.dilation,
                    layer.transposed,
                    layer.output_padding,
                    layer.groups,
                )
            out = tensor_of(layer.node)
            fused = graph.create_node(
                "call_function",
                target,
                (*tensors, bn.eps, *rest),
                {"dtype": None if out is None else out.dtype},
                name="conv_bn_eval",
            )
            new_nodes.append(fused)
            fused.meta = dict(bn.output.meta)
            note_layer(fused, layer.node)
    except Exception:
        for node in reversed(new_nodes):
            graph.erase_node(node)
        raise
    bn.output.replace_all_uses_with(fused)
    for node in (bn.output, *bn.node.users, bn.node, *decision.candidate.path, layer.node):
        # A layer that something asks for its shape stays; nothing computes it.
        if not node.users and not node._erased:
            graph.erase_node(node)
    return fused
