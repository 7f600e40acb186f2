"""Store the masks that the forward keeps for backward in another way than Inductor's on CPU.

Before:  mask = le(y, 0)
After:   mask = as_mask(convert(where(le(y, 0), 1.0, 0.0), uint8))

Once a convolution's output is no longer kept, the cheapest thing for the partitioner to keep of
a ReLU is often its mask, one byte per element. Inductor's vectorised code stores a mask with
``VecMask::store(bool*)``, whose loops GCC does not vectorise with the flag
``-fno-tree-loop-vectorize`` that Inductor gives it: measured with AVX-512, 7 nanoseconds per
element, where converting floats to bytes takes 0.1. ``as_mask`` copies bytes that are 0 or 1
into a tensor of bools as they are. What is kept, and every bit of it, stays the same.

Declines: other devices, masks so small that a call costs more than it gains, masks that are no
result of pointwise operations (nothing generated stores them), and generated C++ wrappers,
which would have to call back into Python.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from . import _compat

__all__ = ["rewrite_masks"]

aten = torch.ops.aten
prims = torch.ops.prims

_LEAST_ELEMENTS = 1 << 14  # about 0.1 ms as Inductor stores it, ten times what a call costs

_library = torch.library.Library("convbn_inductor_pass", "DEF")
# "Flexible" keeps Inductor from bringing the argument into the layout that was traced.
_library.define("as_mask(Tensor bytes) -> Tensor", tags=(torch.Tag.flexible_layout,))


@torch.library.impl(_library, "as_mask", "CPU")
def _as_mask(bytes: Tensor) -> Tensor:
    return bytes.view(torch.bool).clone()


@torch.library.impl(_library, "as_mask", "Meta")
def _as_mask_meta(bytes: Tensor) -> Tensor:
    return torch.empty_like(bytes, dtype=torch.bool)


def rewrite_masks(graph: fx.Graph) -> int:
    """Rewrite the masks among the results of ``graph``, a forward on aten IR; returns how many."""
    output = next(iter(graph.find_nodes(op="output")), None)
    if output is None or _compat.inductor_config.cpp_wrapper:
        return 0
    masks = [n for n in output.all_input_nodes if _is_slow_to_store(n)]
    order = {node: i for i, node in enumerate(graph.nodes)}
    for mask in masks:
        value = mask.meta["val"]
        _hoist(mask, order)
        with graph.inserting_before(mask.next):
            ones, zeros = (
                graph.call_function(
                    aten.full.default,
                    ([], number),
                    {"dtype": torch.float32, "device": value.device, "pin_memory": False},
                )
                for number in (1, 0)
            )
            numbers = graph.call_function(aten.where.self, (mask, ones, zeros))
            stored = graph.call_function(prims.convert_element_type.default, (numbers, torch.uint8))
            kept = graph.call_function(torch.ops.convbn_inductor_pass.as_mask.default, (stored,))
        with _compat.fake_mode_of(value):
            for scalar in (ones, zeros):
                scalar.meta["val"] = torch.empty((), device=value.device)
            numbers.meta["val"] = torch.empty_like(value, dtype=torch.float32)
            stored.meta["val"] = torch.empty_like(value, dtype=torch.uint8)
        kept.meta = dict(mask.meta)
        output.replace_input_with(mask, kept)
    return len(masks)


def _hoist(mask: fx.Node, order: dict[fx.Node, int]) -> None:
    """Move a mask to right after what it is computed from.

    Inductor stores what comes before the last convolution channels-last. The partitioner puts
    masks at the end of the graph, where only what uses a channels-last tensor directly is.
    """
    for source in mask.all_input_nodes:
        if _is_mask(source):
            _hoist(source, order)
    last = max(mask.all_input_nodes, key=order.__getitem__)
    if last.op == "call_function":
        last.append(mask)
        order[mask] = order[last]


def _is_mask(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return (
        isinstance(value, Tensor)
        and value.dtype == torch.bool
        and node.op == "call_function"
        and _compat.is_pointwise(node.target)
    )


def _is_slow_to_store(node: fx.Node) -> bool:
    if not _is_mask(node):
        return False
    value: Tensor = node.meta["val"]
    return value.device.type == "cpu" and _compat.size_hint(value.numel()) >= _LEAST_ELEMENTS
