"""Rule 1: tensors of which backward reads only the shape.

Before, for a layer whose weight needs no gradient:

    dx, _, db = convolution_backward(dy, x, W, ..., output_mask=[True, False, ...])   saves x

After, with ``p = size(x) - ((size(dy) - 1) * stride - 2 * padding + dilation * (k - 1) + 1)``:

    dx = convolution(dy, W, transposed, output_padding=p)     db = sum(dy)            x is not saved

and a plain convolution if the layer is a transposed one. Other operators of the table, and layers
for which the result is not known to have that size, get an uninitialized tensor of x's shape. So do
depthwise layers on a GPU: PyTorch has special kernels for their input gradient, but none for a
transposed depthwise convolution. Declines where the tensor is saved for another reason.

Source: pytorch/pytorch#133566 (open); arXiv 2404.12406 measures it in eager mode.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from ..._torch import compat
from ...codes import Code
from ...graph.builder import Builder
from ...graph.layers import bytes_of, known_equal, numel_of, same_sizes, tensor_of, value_of
from ...graph.strides import memory_order
from ...graph.uses import is_recomputed, is_saved, source_of, users_of
from .site import JointGraph, Site

aten = torch.ops.aten


def find_sites(joint: JointGraph) -> Iterator[Site]:
    """Tensors that are saved for their shape, each with the calls that read it."""
    by_source: dict[fx.Node, list[fx.Node]] = {}
    for node in joint.graph.nodes:
        if node in joint.shape_readers and node.args[1] not in joint.backward:
            by_source.setdefault(source_of(node.args[1]), []).append(node)
    readers = joint.backward - joint.shape_readers
    for source, calls in by_source.items():
        code, detail = Code.SHAPE_ONLY, ", ".join(str(n.target).split(".")[1] for n in calls)
        if is_saved(source, readers) or _is_read(joint, source):
            code, detail = Code.SAVED_ANYWAY, str(source)
        yield Site("shape", source, code, detail, _bytes_less(joint, source), tuple(calls))


def _is_read(joint: JointGraph, node: fx.Node) -> bool:
    """Whether pointwise calls need a tensor, and cannot do with what it is computed from."""
    sources = node.all_input_nodes if compat.is_pointwise(node.target) else []
    return joint.reads(node) and not (sources and all(map(joint.has, sources)))


def _bytes_less(joint: JointGraph, source: fx.Node) -> int:
    if source.op == "placeholder" or is_recomputed(source):
        # An input is not made for backward; but saving it keeps it in memory, which matters where
        # it is what another graph has computed.
        return 0
    others = (tensor_of(u) for u in users_of(source) if u not in joint.forward)
    has_mask = any(t is not None and t.dtype == torch.bool for t in others)
    return bytes_of(source) - has_mask * numel_of(source)


def rewrite(build: Builder, call: fx.Node, site: Site) -> None:
    """Compute the same as ``call`` without the tensor that it reads the shape of."""
    args: Any = call.args
    dy, _, *others = args
    is_conv = call.target is aten.convolution_backward.default
    geometry = _input_gradient(call) if is_conv and args[10][0] else ()
    if not is_conv or geometry is None:
        new = build.call(call.target, dy, _stand_in(build, call), *others, **call.kwargs)
        build.replace(call, new)
        return
    results: dict[Any, fx.Node] = {}
    if args[10][0]:
        results[0] = build.call(aten.convolution.default, dy, args[2], *geometry)
    if args[10][2]:
        dims = [d for d in range(value_of(dy).ndim) if d != 1]
        results[2] = build.call(aten.sum.dim_IntList, dy, dims)
    for user in list(call.users):
        if user.args[1] in results:
            build.replace(user, results[user.args[1]])


def _input_gradient(call: fx.Node) -> tuple[Any, ...] | None:
    """The further arguments of the convolution that gives the layer's input gradient.

    None if there is none that is known to have the right size, or to have a kernel.
    """
    args: Any = call.args
    dy, x, weight, _, stride, padding, dilation, transposed, _, groups, _ = args
    x_sizes, dy_sizes, kernel = (value_of(n).shape[2:] for n in (x, dy, weight))
    if any(known_equal(size, 0) for size in dy_sizes):  # PyTorch convolves no such tensor
        return None
    each = (v * len(kernel) if len(v) == 1 else v for v in (stride, padding, dilation))
    per_dim = list(zip(x_sizes, dy_sizes, kernel, *each, strict=True))
    if transposed:
        # Sizes of a plain convolution.
        made = [(m + 2 * p - d * (k - 1) - 1) // s + 1 for _, m, k, s, p, d in per_dim]
        fits = same_sizes(x_sizes, made)
        return (None, stride, padding, dilation, False, [0] * len(kernel), groups) if fits else None
    if value_of(dy).is_cuda and groups != 1 and known_equal(value_of(weight).shape[1], 1):
        return None
    # What a transposed convolution of dy must add at the end to give x's size.
    missing = ((n - ((m - 1) * s - 2 * p + d * (k - 1) + 1), s) for n, m, k, s, p, d in per_dim)
    added = [_surely_in_range(size, stride) for size, stride in missing]
    return None if None in added else (None, stride, padding, dilation, True, added, groups)


def _surely_in_range(value: Any, stop: Any) -> int | None:
    """The number in ``range(stop)`` that ``value`` is for every input, None if it is unknown."""
    numbers = range(stop if isinstance(stop, int) else 1)
    return next((i for i in numbers if known_equal(value, i)), None)


def _stand_in(build: Builder, call: fx.Node) -> fx.Node:
    """An uninitialized tensor of the shape, dtype and order of strides of the second argument."""
    args: Any = call.args
    dy, x = args[:2]
    tensor, sizes = value_of(x), build.sizes(x)
    order, inverse = memory_order(tensor.stride())
    # Of the gradient, so that it is made in backward.
    new = build.call(aten.new_empty.default, dy, [sizes[d] for d in order], dtype=tensor.dtype)
    return new if inverse == sorted(inverse) else build.call(aten.permute.default, new, inverse)
