"""Preserve the traced strides where something reads them: another kernel may choose others."""

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from .._torch import compat, inductor
from . import layers
from .builder import Builder
from .layers import tensor_of, value_of
from .uses import depending_on

aten = torch.ops.aten


def memory_order(strides: Sequence[Any]) -> tuple[list[int], list[int]]:
    """A permutation of the dimensions to the order in memory, outermost first; and its inverse."""
    hints = [compat.size_hint(s) for s in strides]
    order = sorted(range(len(hints)), key=lambda d: -hints[d])
    return order, [order.index(d) for d in range(len(order))]


def laid_out(node: fx.Node, strides: Sequence[Any], build: Builder) -> fx.Node:
    """``node`` with ``strides``: its producer writes it that way, or it is copied.

    Symbolic strides only determine the order of dimensions; the result is then dense.
    """
    if all(isinstance(s, int) for s in strides):
        return build.call(inductor.force_stride_order, node, list(strides))
    order, inverse = memory_order(strides)
    moved = build.call(aten.permute.default, node, order)
    dense = build.call(aten.clone.default, moved, memory_format=torch.contiguous_format)
    return build.call(aten.permute.default, dense, inverse)


def keep_observed(graph: fx.Graph, changed: Sequence[fx.Node], build: Builder) -> None:
    """Give calls that read strides the traced ones, for operands that depend on ``changed``.

    A library's kernel may lay out its result differently, and what is computed from it follows. For
    calls that read strides, Inductor enforces the graph's metadata, which is kept as traced here.
    """
    inductor.restore_hidden_outputs(graph)
    affected = depending_on(changed)
    readers = (n for n in graph.nodes if compat.reads_strides(n.target))
    read = (base_of(source) for reader in readers for source in reader.all_input_nodes)
    observed = [*returned_in_parts(graph), *(n for n in read if tensor_of(n) is not None)]
    for node in dict.fromkeys(filter(affected.__contains__, observed)):
        users = list(node.users)
        with graph.inserting_before(node.next):
            new = laid_out(node, value_of(node).stride(), build)
        for user in users:
            user.replace_input_with(node, new)


def returned_in_parts(graph: fx.Graph) -> Iterator[fx.Node]:
    """Tensors of which the graph returns a part: a slice has the strides of the whole tensor."""
    (output,) = graph.find_nodes(op="output")
    for part in output.all_input_nodes:
        size, whole = tensor_of(part), tensor_of(base_of(part))
        if size is None or whole is None or layers.known_equal(size.numel(), whole.numel()):
            continue
        yield base_of(part)


def base_of(node: fx.Node) -> fx.Node:
    """What ``node`` is a view of, however deep; itself if it is none."""
    while True:
        call = node.all_input_nodes[0] if node.target is operator.getitem else node
        if not compat.is_view(call.target):
            return node
        node = call.all_input_nodes[0]
