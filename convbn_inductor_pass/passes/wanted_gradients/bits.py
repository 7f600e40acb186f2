"""Rule 4: masks as bits.

Before: the partitioner saves a mask for backward, a byte per element.

After, with eight neighbours along a dimension that is a multiple of 8 (channels, if they are):

    forward   bits = sum over j of mask[8 * i + j] << j, a uint8           is saved
    backward  mask[8 * i + j] = bits[i] >> j & 1

Runs after the partitioner, on both graphs, so that it sees which masks are saved. All of it is
plain aten, which Inductor generates code for together with what makes the mask, and what uses it.

Declines small masks, those that are in memory anyway (inputs and outputs), and those without such a
dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..._torch import compat
from ...codes import Code
from ...config import Options
from ...graph.builder import Builder
from ...graph.layers import tensor_of, value_of
from ...graph.provenance import module_path
from .site import PROVENANCE, Site, bytes_of

__all__ = ["find_masks", "pack"]

aten = torch.ops.aten
prims = torch.ops.prims

_LEAST_ELEMENTS = 1 << 12  # below, the saving is less than what an allocation rounds up to


def find_masks(forward: fx.Graph, backward: fx.Graph, options: Options) -> list[Site]:
    """Masks that the forward saves for the backward."""
    saved = {n.name for n in backward.find_nodes(op="placeholder")}
    (output,) = forward.find_nodes(op="output")
    returned: Any = list(output.args[0])
    sites = []
    for node in output.all_input_nodes:
        tensor = tensor_of(node)
        if node.op != "call_function" or node.name not in saved or returned.count(node) != 1:
            continue
        if tensor is None or tensor.dtype != torch.bool:
            continue
        if compat.size_hint(tensor.numel()) >= _LEAST_ELEMENTS:
            sites.append(_site(node, options))
    return sites


def _site(mask: fx.Node, options: Options) -> Site:
    code, detail = Code.MASK_AS_BITS, ""
    if not options.bit_masks:
        code, detail = Code.DENIED, "bit_masks=False"
    elif not options.allows(module_path(mask)):
        code, detail = Code.DENIED, module_path(mask)
    elif _packed_dim(mask) is None:
        code = Code.NOT_DIVISIBLE
    return Site("mask", mask, code, detail, bytes_of(mask) * 7 // 8, (mask,))


def _packed_dim(mask: fx.Node) -> int | None:
    """The dimension along which eight elements become a byte: the channels if possible."""
    shape = value_of(mask).shape
    dims = sorted(range(len(shape)), key=lambda d: (d != 1, d))
    fitting = (d for d in dims if isinstance(shape[d], int) and shape[d] % 8 == 0 and shape[d] > 0)
    return next(fitting, None)


def pack(sites: list[Site], forward: fx.Graph, backward: fx.Graph) -> int:
    """Save the masks of sites as bits; returns how many."""
    wanted = [s.node for s in sites if s.code.rewritten]
    inputs = {n.name: n for n in backward.find_nodes(op="placeholder")}
    (output,) = forward.find_nodes(op="output")
    for mask in wanted:
        taken, dim = inputs[mask.name], _packed_dim(mask)
        if dim is None:
            raise AssertionError(f"{mask} was found to have a dimension to pack")
        with compat.fake_mode_of(value_of(mask)), compat.plain_dispatch():
            with forward.inserting_before(mask.next):
                bits = _packed(Builder(forward, share=False), mask, dim)
            bits._rename(f"{mask.name}_bits")
            output.replace_input_with(mask, bits)
            with backward.inserting_before(taken):
                given = backward.placeholder(bits.name)
            given.meta = {**taken.meta, "val": bits.meta["val"]}
            given.meta.pop("tensor_meta", None)
            with backward.inserting_before(min(taken.users)):
                build = Builder(backward, share=False)
                build.meta = {k: v for k, v in mask.meta.items() if k in PROVENANCE}
                unpacked = _unpacked(build, given, dim)
        taken.replace_all_uses_with(unpacked)
        backward.erase_node(taken)
    return len(wanted)


def _packed(build: Builder, mask: fx.Node, dim: int) -> fx.Node:
    """The uint8 tensor with ``size // 8`` along ``dim`` that holds a mask."""
    build.meta = {k: v for k, v in mask.meta.items() if k in PROVENANCE}
    sizes = _sizes(build, mask)
    by_eight = build.call(
        aten.view.default, mask, [*sizes[:dim], sizes[dim] // 8, 8, *sizes[dim + 1 :]]
    )
    shifted = build.call(
        aten.bitwise_left_shift.Tensor, build.cast(by_eight, torch.int32), _shifts(build, mask, dim)
    )
    total = build.call(aten.sum.dim_IntList, shifted, [dim + 1], False, dtype=torch.int32)
    return build.cast(total, torch.uint8)


def _unpacked(build: Builder, bits: fx.Node, dim: int) -> fx.Node:
    """The mask that :func:`_packed` was made of."""
    sizes = _sizes(build, bits)
    wide = build.cast(build.call(aten.unsqueeze.default, bits, dim + 1), torch.int32)
    shifted = build.call(aten.bitwise_right_shift.Tensor, wide, _shifts(build, bits, dim))
    mask = build.cast(build.call(aten.bitwise_and.Scalar, shifted, 1), torch.bool)
    return build.call(aten.reshape.default, mask, [*sizes[:dim], sizes[dim] * 8, *sizes[dim + 1 :]])


def _shifts(build: Builder, like: fx.Node, dim: int) -> fx.Node:
    """0 to 7, along the dimension after ``dim`` of a tensor that has one more than ``like``."""
    tensor = value_of(like)
    numbers = build.call(
        prims.iota.default,
        8,
        start=0,
        step=1,
        dtype=torch.int32,
        device=tensor.device,
        requires_grad=False,
    )
    return build.call(aten.view.default, numbers, [8, *[1] * (tensor.ndim - dim - 1)])


def _sizes(build: Builder, node: fx.Node) -> list[Any]:
    shape = value_of(node).shape
    return [
        s if isinstance(s, int) else build.call(aten.sym_size.int, node, d)
        for d, s in enumerate(shape)
    ]
