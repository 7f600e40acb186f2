"""Keep the strides that were traced where something reads them: a kernel may choose others."""

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

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def laid_out(node: fx.Node, strides: Sequence[Any], build: Builder) -> fx.Node:
    """``node`` with ``strides``, if it can be made so by what computes it, or a copy.

    Of symbolic strides the order counts: what comes is dense.
    """
    if all(isinstance(s, int) for s in strides):
        return build.call(inductor.force_stride_order, node, list(strides))
    hints = [compat.size_hint(s) for s in strides]
    order = sorted(range(len(hints)), key=lambda d: -hints[d])
    moved = build.call(aten.permute.default, node, order)
    dense = build.call(aten.clone.default, moved, memory_format=torch.contiguous_format)
    return build.call(aten.permute.default, dense, [order.index(d) for d in range(len(order))])


def keep_observed(graph: fx.Graph, changed: Sequence[fx.Node], build: Builder) -> None:
    """Lay out as traced what depends on ``changed`` and is read by calls that see how it lies.

    A library's kernel may lay its result out otherwise than the graph says, and so does what is
    computed from that, up to the next copy. Inductor accounts for that in most of aten's operators.
    It gives others what the graph says, and that is what they get: a copy, if need be.
    """
    inductor.restore_hidden_outputs(graph)
    affected = depending_on(changed)
    for node in dict.fromkeys(filter(affected.__contains__, _observed(graph))):
        users = list(node.users)
        with graph.inserting_before(node.next):
            new = laid_out(node, value_of(node).stride(), build)
        for user in users:
            user.replace_input_with(node, new)


def returned_in_parts(graph: fx.Graph) -> Iterator[fx.Node]:
    """Tensors of which the graph returns a slice or the like: Inductor restores no strides then."""
    (output,) = graph.find_nodes(op="output")
    for part in output.all_input_nodes:
        size, whole = tensor_of(part), tensor_of(base_of(part))
        if size is None or whole is None:
            continue
        if not layers.known_equal(size.numel(), whole.numel()):
            yield base_of(part)


def _observed(graph: fx.Graph) -> Iterator[fx.Node]:
    """What is in the memory that calls read otherwise than element by element."""
    yield from returned_in_parts(graph)
    readers = (n for n in graph.nodes if compat.reads_strides(n.target))
    read = (base_of(source) for reader in readers for source in reader.all_input_nodes)
    yield from (node for node in read if tensor_of(node) is not None)


def base_of(node: fx.Node) -> fx.Node:
    """What ``node`` is a view of, however deep; itself if it is none."""
    while True:
        call = node.all_input_nodes[0] if node.target is operator.getitem else node
        if not compat.is_view(call.target):
            return node
        node = call.all_input_nodes[0]


def views_of(node: fx.Node) -> list[fx.Node]:
    """All views of ``node``, and views of those."""
    found = [u for u in node.users if compat.is_view(u.target)]
    for view in found:
        found += [u for u in view.users if compat.is_view(u.target) and u not in found]
    return found
