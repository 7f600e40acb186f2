"""Rule 4: the masks that the partitioner saves, a byte per element, as bits.

A dimension that is a multiple of 8 is split in two, one of them of size 8:

    forward   bits = sum over j of mask[j] * 2**j, a uint8        is saved
    backward  mask[j] = bits & 2**j != 0

Plain aten, which Inductor fuses with what makes the mask, and what uses it. The sum is one of
floats, which are exact and which its C++ vectorizes.

Which dimension: the channels, neighbours in a channels-last tensor, so that on a GPU the kernel
that makes the mask packs it as well. On a CPU the images, or else rows, before the channels, with
eight of them in a byte that lie far apart: then every loop runs along memory, whatever the layout.

Declines small masks, those in memory anyway (inputs and outputs), and those without such a
dimension.
"""

import collections
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from ...codes import Code
from ...graph.builder import Builder
from ...graph.layers import numel_of, value_of
from ...graph.provenance import provenance_of
from .site import Site

aten = torch.ops.aten
prims = torch.ops.prims

_NO_VERSION_CHECK = "saved_tensor_with_no_vc_check"  # AOTAutograd counts what has it
_LEAST_ELEMENTS = 1 << 12  # below, the saving is less than what an allocation rounds up to


def find_masks(forward: fx.Graph, backward: fx.Graph) -> Iterator[Site]:
    """Masks that the forward saves for the backward."""
    saved = {n.name for n in backward.find_nodes(op="placeholder") if n.users}
    (output,) = forward.find_nodes(op="output")
    returned: Any = collections.Counter(output.args[0])
    for node in output.all_input_nodes:
        if node.op == "call_function" and node.name in saved and returned[node] == 1:
            size = numel_of(node)
            if size >= _LEAST_ELEMENTS and value_of(node).dtype == torch.bool:
                code = Code.MASK_AS_BITS if _split_of(node) else Code.NOT_DIVISIBLE
                yield Site("mask", node, code, nbytes=size * 7 // 8, calls=(node,))


def _split_of(mask: fx.Node) -> tuple[int, int] | None:
    """The dimension along which eight elements become a byte, and where the new one is put."""
    tensor = value_of(mask)
    on_cpu, dims = tensor.device.type == "cpu", range(tensor.ndim)
    for dim in sorted(dims, key=lambda d: (d == 1) == on_cpu):  # channels last on CPU, else first
        size = tensor.shape[dim]
        if isinstance(size, int) and size % 8 == 0 and size > 0:
            return dim, dim if on_cpu or dim == 0 else dim + 1
    return None


def pack(sites: list[Site], forward: fx.Graph, backward: fx.Graph) -> int:
    """Save the masks of sites as bits; returns how many.

    Both sides of a mask are made before it gets another value: if that fails, the graphs agree, and
    only the masks before it are packed.
    """
    taken = {n.name: n for n in backward.find_nodes(op="placeholder")}
    (output,) = forward.find_nodes(op="output")
    in_forward, in_backward = Builder(forward), Builder(backward)
    masks = [s.node for s in sites if s.code.rewritten]
    for mask in masks:
        given = taken[mask.name]
        split: Any = _split_of(mask)
        in_forward.meta = in_backward.meta = provenance_of(mask)
        with forward.inserting_before(mask.next):
            bits = _packed(in_forward, mask, *split)
        if _NO_VERSION_CHECK in mask.meta:
            bits.meta[_NO_VERSION_CHECK] = mask.meta[_NO_VERSION_CHECK]
        users, meta = set(given.users), given.meta
        given.meta = {k: v for k, v in meta.items() if k != "tensor_meta"}
        given.meta["val"] = bits.meta["val"]
        try:
            with backward.inserting_before(min(users)):
                unpacked = _unpacked(in_backward, given, *split)
        except Exception:
            given.meta = meta
            raise
        given.replace_all_uses_with(unpacked, delete_user_cb=users.__contains__)
        output.replace_input_with(mask, bits)
        # The backward's input has the name of what the forward returns for it.
        bits._rename(f"{mask.name}_bits")
        given._rename(bits.name)
        given.target = given.name
    return len(masks)


def _packed(build: Builder, mask: fx.Node, dim: int, new: int) -> fx.Node:
    """The uint8 tensor with an eighth of the size along ``dim`` that holds a mask."""
    sizes = build.sizes(mask)
    sizes[dim] //= 8
    split = build.call(aten.view.default, mask, [*sizes[:new], 8, *sizes[new:]])
    powers = build.cast(_powers(build, mask, new), torch.float32)
    scaled = build.call(aten.mul.Tensor, build.cast(split, torch.float32), powers)
    return build.cast(build.call(aten.sum.dim_IntList, scaled, [new]), torch.uint8)


def _unpacked(build: Builder, bits: fx.Node, dim: int, new: int) -> fx.Node:
    """The mask that :func:`_packed` was made of."""
    sizes = build.sizes(bits)
    sizes[dim] *= 8
    wide = build.cast(build.call(aten.unsqueeze.default, bits, new), torch.int32)
    chosen = build.call(aten.bitwise_and.Tensor, wide, _powers(build, bits, new))
    return build.call(aten.reshape.default, build.call(aten.ne.Scalar, chosen, 0), sizes)


def _powers(build: Builder, like: fx.Node, new: int) -> fx.Node:
    """1, 2, 4 to 128, int32, along the dimension ``new`` that ``like`` is to get."""
    tensor = value_of(like)
    kwargs = {"dtype": torch.int32, "device": tensor.device, "requires_grad": False}
    shifts = build.call(prims.iota.default, 8, start=0, step=1, **kwargs)
    one = build.call(aten.full.default, [], 1, dtype=torch.int32, device=tensor.device)
    powers = build.call(aten.bitwise_left_shift.Tensor, one, shifts)
    return build.call(aten.view.default, powers, [8, *[1] * (tensor.ndim - new)])
