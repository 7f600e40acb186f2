"""Rule 4: masks as bits.

Before: the partitioner saves a mask for backward, a byte per element.

After, with a dimension that is a multiple of 8 split in two, one of them of size 8:

    forward   bits = sum over j of mask[j] * 2**j, a uint8        is saved
    backward  mask[j] = bits & 2**j != 0

Runs after the partitioner, on both graphs, so that it sees which masks are saved. All of it is
plain aten, which Inductor generates code for together with what makes the mask, and what uses it.
The sum is one of floats, which are exact and which Inductor's C++ vectorizes.

Which dimension: the channels, neighbours in a channels-last tensor, so that on a GPU the kernel
that makes the mask packs it as well. On a CPU the images first, with eight of them in a byte that
lie far apart: then every loop runs along memory, whatever the layout.

Declines small masks, those that are in memory anyway (inputs and outputs), and those without such a
dimension.
"""

from __future__ import annotations

import collections
from typing import Any

import torch
from torch import fx

from ..._torch import compat
from ...codes import Code
from ...config import Options
from ...graph.builder import Builder
from ...graph.layers import bytes_of, tensor_of, value_of
from ...graph.provenance import module_path, provenance_of
from .site import Site

__all__ = ["find_masks", "pack"]

aten = torch.ops.aten
prims = torch.ops.prims

_NO_VERSION_CHECK = "saved_tensor_with_no_vc_check"  # AOTAutograd counts what has it
_LEAST_ELEMENTS = 1 << 12  # below, the saving is less than what an allocation rounds up to


def find_masks(forward: fx.Graph, backward: fx.Graph, options: Options) -> list[Site]:
    """Masks that the forward saves for the backward."""
    saved = {n.name for n in backward.find_nodes(op="placeholder") if n.users}
    (output,) = forward.find_nodes(op="output")
    returned = collections.Counter(output.args[0])
    sites = []
    for node in output.all_input_nodes:
        tensor = tensor_of(node)
        if node.op != "call_function" or node.name not in saved or returned[node] != 1:
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
    elif _split_of(mask) is None:
        code = Code.NOT_DIVISIBLE
    return Site("mask", mask, code, detail, bytes_of(mask) * 7 // 8, (mask,))


def _split_of(mask: fx.Node) -> tuple[int, int] | None:
    """The dimension along which eight elements become a byte, and where the new one is put."""
    tensor = value_of(mask)
    first = 0 if tensor.device.type == "cpu" else 1
    dims = sorted(range(tensor.ndim), key=lambda d: (d != first, d != 1, d))
    sizes = tensor.shape
    fitting = (d for d in dims if isinstance(sizes[d], int) and sizes[d] % 8 == 0 and sizes[d] > 0)
    dim = next(fitting, None)
    if dim is None:
        return None
    return dim, dim if dim == 0 and tensor.ndim > 1 else dim + 1


def pack(sites: list[Site], forward: fx.Graph, backward: fx.Graph) -> int:
    """Save the masks of sites as bits; returns how many.

    Both sides of all masks are made before anything is given another value: if that fails, the
    graphs still agree.
    """
    taken = {n.name: n for n in backward.find_nodes(op="placeholder")}
    pairs = [(s.node, taken[s.node.name]) for s in sites if s.code.rewritten]
    builders = Builder(forward, share=False), Builder(backward, share=False)
    before = {given: given.meta for _, given in pairs}
    made = []
    try:
        for mask, given in pairs:
            made.append(_pack_one(mask, given, *builders))
    except Exception:
        for given, meta in before.items():
            given.meta = meta
        raise
    packed = {mask: bits for (mask, _), (bits, *_) in zip(pairs, made, strict=True)}
    for output in forward.find_nodes(op="output"):
        output.args = fx.map_arg(output.args, lambda n: packed.get(n, n))
    for (mask, given), (bits, own, unpacked) in zip(pairs, made, strict=True):
        # The backward's input has the name of what the forward returns for it.
        bits._rename(f"{mask.name}_bits")
        given._rename(bits.name)
        given.target = given.name
        given.replace_all_uses_with(unpacked, delete_user_cb=lambda user, own=own: user not in own)
    return len(pairs)


def _pack_one(
    mask: fx.Node, given: fx.Node, in_forward: Builder, in_backward: Builder
) -> tuple[fx.Node, list[fx.Node], fx.Node]:
    """The bits, the calls that take them in backward, and the mask made of them there."""
    split: Any = _split_of(mask)
    in_forward.meta = in_backward.meta = provenance_of(mask)
    with compat.fake_mode_of(value_of(mask)), compat.plain_dispatch():
        with mask.graph.inserting_before(mask.next):
            bits = _packed(in_forward, mask, *split)
        if _NO_VERSION_CHECK in mask.meta:
            bits.meta[_NO_VERSION_CHECK] = mask.meta[_NO_VERSION_CHECK]
        users = set(given.users)
        given.meta = {**given.meta, "val": bits.meta["val"]}
        given.meta.pop("tensor_meta", None)
        with given.graph.inserting_before(min(users)):
            unpacked = _unpacked(in_backward, given, *split)
    own = [u for u in given.users if u not in users]
    return bits, own, unpacked


def _packed(build: Builder, mask: fx.Node, dim: int, new: int) -> fx.Node:
    """The uint8 tensor with an eighth of the size along ``dim`` that holds a mask."""
    sizes = _sizes(build, mask)
    sizes[dim] //= 8
    split = build.call(aten.view.default, mask, [*sizes[:new], 8, *sizes[new:]])
    powers = build.cast(_powers(build, mask, new), torch.float32)
    scaled = build.call(aten.mul.Tensor, build.cast(split, torch.float32), powers)
    return build.cast(build.call(aten.sum.dim_IntList, scaled, [new]), torch.uint8)


def _unpacked(build: Builder, bits: fx.Node, dim: int, new: int) -> fx.Node:
    """The mask that :func:`_packed` was made of."""
    sizes = _sizes(build, bits)
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


def _sizes(build: Builder, node: fx.Node) -> list[Any]:
    shape = value_of(node).shape
    return [
        s if isinstance(s, int) else build.call(aten.sym_size.int, node, d)
        for d, s in enumerate(shape)
    ]
