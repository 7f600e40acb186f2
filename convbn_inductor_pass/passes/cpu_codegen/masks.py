"""Store and load the masks that are saved for backward otherwise than Inductor does on CPU.

Forward, before:   mask = le(y, 0)
Forward, after:    mask = as_mask(convert(where(le(y, 0), 1.0, 0.0), uint8))

Backward, before:  where(mask, 0, dy)
Backward, after:   where(ne(convert(as_bytes(mask), float32), 0), 0, dy)

Works around: Inductor's vectorized code stores and loads masks with ``VecMask::store`` and
``VecMask::from``, whose loops over elements GCC does not vectorize with the flag
``-fno-tree-loop-vectorize`` that Inductor gives it (torch 2.11 to 2.15). On a busy core with
AVX-512 a mask takes 37 to 54 ns per element stored and 15 to 20 loaded, a byte 0.7 and 1.8. Once a
convolution's output is not saved, the partitioner often saves a ReLU's mask, a byte per element.

Can go: once ``VecMask`` is stored and loaded with vector instructions, or masks are saved as bits.

What is saved, and every bit of it, stays the same. Declines: other devices; masks so small that a
call costs more than it gains; masks that are no result of pointwise operators (no generated code
stores them); generated C++ wrappers, which would have to call back into Python.
"""

from __future__ import annotations

import torch
from torch import fx

from ..._torch import compat, inductor
from ...graph.builder import Builder
from ...graph.layers import tensor_of, value_of
from . import operators

__all__ = ["rewrite_masks"]

aten = torch.ops.aten

_LEAST_ELEMENTS = 1 << 14  # about 0.1 ms as Inductor stores it, ten times what a call costs


def rewrite_masks(graph: fx.Graph) -> int:
    """Rewrite how masks leave ``graph``, a forward on aten IR, or enter it, a backward.

    Returns how many.
    """
    output = next(iter(graph.find_nodes(op="output")), None)
    if output is None or not inductor.for_python():
        return 0
    if inductor.is_backward(graph):
        inputs = graph.find_nodes(op="placeholder")
        return _rewrite_loads(graph, [n for n in inputs if _is_large_mask(n)])
    masks = [n for n in output.all_input_nodes if _is_large_mask(n) and _is_computed(n)]
    return _rewrite_stores(graph, masks, output)


def _rewrite_loads(graph: fx.Graph, masks: list[fx.Node]) -> int:
    build = Builder(graph, share=False)
    rewritten = 0
    for mask in masks:
        users = [n for n in mask.users if compat.is_pointwise(n.target)]
        if not users:
            continue
        with graph.inserting_before(min(users)), compat.fake_mode_of(value_of(mask)):
            floats = build.cast(build.call(operators.as_bytes, mask), torch.float32)
            loaded = build.call(aten.ne.Scalar, floats, 0)
        for user in users:
            user.replace_input_with(mask, loaded)
        rewritten += 1
    return rewritten


def _rewrite_stores(graph: fx.Graph, masks: list[fx.Node], output: fx.Node) -> int:
    build = Builder(graph, share=False)
    for mask in masks:
        value = value_of(mask)
        _hoist(mask)
        with graph.inserting_before(mask.next), compat.fake_mode_of(value):
            scalar = {"dtype": torch.float32, "device": value.device, "pin_memory": False}
            ones, zeros = (build.call(aten.full.default, [], n, **scalar) for n in (1, 0))
            floats = build.call(aten.where.self, mask, ones, zeros)
            saved = build.call(operators.as_mask, build.cast(floats, torch.uint8))
        saved.meta = dict(mask.meta)
        output.replace_input_with(mask, saved)
    return len(masks)


def _hoist(mask: fx.Node) -> None:
    """Move a mask to right after what it is computed from.

    Inductor stores what comes before the last convolution channels-last. The partitioner puts
    masks at the end of the graph, where only what uses a channels-last tensor directly is.
    """
    for source in mask.all_input_nodes:
        if _is_mask(source) and _is_computed(source):
            _hoist(source)
    last = max(mask.all_input_nodes)  # by where they are now: sources may just have been moved
    if last.op == "call_function":
        last.append(mask)


def _is_mask(node: fx.Node) -> bool:
    value = tensor_of(node)
    return value is not None and value.dtype == torch.bool


def _is_large_mask(node: fx.Node) -> bool:
    if not _is_mask(node) or value_of(node).device.type != "cpu":
        return False
    return compat.size_hint(value_of(node).numel()) >= _LEAST_ELEMENTS


def _is_computed(node: fx.Node) -> bool:
    return node.op == "call_function" and compat.is_pointwise(node.target)
