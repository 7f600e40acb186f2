"""Rule 3: the mask of an activation y before ``p, i = max_pool(y)``, from what is pooled.

Before:  dz = where(y <= 0, 0, scatter(dp, i))    saves a mask of y's size
After:   dz = scatter(where(p <= 0, 0, dp), i)    saves one of p's size, or none if p is saved

Equal to the bit: a gradient reaches only the position i of a window, whose value in y is p, and
what reaches one position from overlapping windows is masked alike. Ties, NaN and windows of zeros
included: whatever i is, y's value there is p. Positions that no window names get 0 both ways.

So for every mask that is made of comparisons of y with constants, or of comparisons of z that are
such ones (:mod:`activations`). Declines where y, or what it is computed from, is there in backward
anyway, so that its mask is recomputed.
"""

import itertools
import math
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from ...codes import Code
from ...graph import layers
from ...graph.builder import Builder
from ...graph.layers import known_equal, numel_of, same_shape, same_sizes, value_of
from .activations import COMPARISONS, activation_at, constant_of, is_exact_cast, operand_of
from .site import JointGraph, Site

aten = torch.ops.aten
prims = torch.ops.prims

_POOLS = (
    *(aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default),
    *(aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default),
    prims._low_memory_max_pool_with_offsets.default,
)
_UNPOOLS = (
    *(aten.max_pool2d_with_indices_backward.default, aten.max_pool3d_with_indices_backward.default),
    *(aten.adaptive_max_pool2d_backward.default, aten.adaptive_max_pool3d_backward.default),
    aten.scatter_add.default,
)
_SAME_ORDER = (*layers.RESHAPES, aten.clone.default)
_LOGIC = (
    *(aten.bitwise_or.Tensor, aten.bitwise_and.Tensor),
    *(aten.logical_or.default, aten.logical_and.default),
)


class _Unpooling(NamedTuple):
    """A masked gradient of what is pooled, ``where(mask, 0, scatter(dp))`` or the like.

    ``path`` goes from ``dp``, in the shape of ``pooled``, through ``unpool`` to the operand of the
    where that is not zero; each node takes the one before. ``y`` is what is pooled.
    """

    path: list[fx.Node]
    unpool: fx.Node
    pooled: fx.Node
    y: fx.Node


def find_sites(joint: JointGraph) -> Iterator[Site]:
    """Masks of what is pooled, on the gradient that pooling's backward gives."""
    for node in joint.graph.find_nodes(op="call_function", target=aten.where.self):
        found = _unpooling_at(node) if node in joint.backward else None
        if found is None:
            continue
        y, pooled = found.y, found.pooled
        code, detail = Code.MASK_AFTER_POOLING, str(pooled)
        if joint.has(y, {found.unpool}):
            code, detail = Code.SAVED_ANYWAY, str(y)
        nbytes = numel_of(y) - (0 if joint.reads(pooled) else numel_of(pooled))  # a byte for each
        yield Site("pooling", y, code, detail, nbytes, (node,))


def rewrite(build: Builder, call: fx.Node, site: Site) -> None:
    """Mask the pooled gradient, and scatter that."""
    found: Any = _unpooling_at(call)
    dp, mask = found.path[0], _mask_of(call.args[0], found.pooled, build)
    like = {"dtype": value_of(dp).dtype, "device": value_of(dp).device}
    zero = build.call(aten.full.default, [], 0, **like)
    values = (dp if a is found.path[-1] else zero for a in call.args[1:])
    new = build.call(aten.where.self, mask, *values)
    for before, step in itertools.pairwise(found.path):
        # Strides may have changed; the order of elements has not.
        is_view = step.target in (aten.view.default, aten._unsafe_view.default)
        target = aten.reshape.default if is_view else step.target
        new = build.call(target, *(new if a is before else a for a in step.args), **step.kwargs)
    build.replace(call, new)


def _unpooling_at(where: fx.Node) -> _Unpooling | None:
    mask, *operands = where.args
    values = [v for v in operands if not _is_zero(v)]
    if len(values) != 1 or not isinstance(values[0], fx.Node):
        return None
    (value,) = values
    if value_of(value).dtype != value_of(where).dtype or not same_shape(value, where):
        return None  # where() casts or broadcasts
    path = _in_same_order(value, layers.is_cast)
    unpool = path[0]
    pool = _pool_of(unpool) if unpool.target in _UNPOOLS else None
    if pool is None:
        return None
    y = _in_same_order(pool.args[0], is_exact_cast)[0]
    pooled = next((u for u in pool.users if u.target is operator.getitem and u.args[1] == 0), None)
    if pooled is None or not same_shape(y, where) or not _is_mask(mask, y):
        return None
    # The last of what holds the gradient in the order of p that has p's shape, too.
    scattered = unpool.args[3 if unpool.target is aten.scatter_add.default else 0]
    before = _in_same_order(scattered, layers.is_cast)
    fits = [i for i, n in enumerate(before) if same_shape(n, pooled)]
    return _Unpooling([*before[fits[-1] :], *path], unpool, pooled, y) if fits else None


def _is_zero(node: Any) -> bool:
    """Whether every element is +0, which a masked gradient and an empty scatter have."""
    value = constant_of(node)
    return value == 0 and math.copysign(1, value) > 0


def _in_same_order(node: Any, is_cast: Any = lambda node: False) -> list[fx.Node]:
    """``node`` last, before it what it holds the elements of in the same order, less casts."""
    path = [node]
    while path[0].target in _SAME_ORDER or is_cast(path[0]):
        path.insert(0, path[0].args[0])
    return path


def _pool_of(unpool: fx.Node) -> fx.Node | None:
    """The pooling whose indices say where ``unpool`` scatters to; None if it is not sure."""
    args: Any = unpool.args
    is_scatter = unpool.target is aten.scatter_add.default
    indices = args[2] if is_scatter else args[-1]
    node: Any = _in_same_order(indices)[0]
    if node.target is prims._low_memory_max_pool_offsets_to_indices.default:
        node = node.args[0]
    if node.target is not operator.getitem or node.args[1] != 1:
        return None
    pool: Any = node.args[0]
    if pool.target not in _POOLS:
        return None
    shape = value_of(pool.args[0]).shape
    if not is_scatter:
        return pool if same_sizes(value_of(args[1]).shape, shape) else None
    # Indices count the positions of one channel of one image, which is a row here.
    spatial = len(pool.args[1])  # a kernel's size, or the output's
    rows = [math.prod(shape[:-spatial]), math.prod(shape[-spatial:])]
    fits = (
        _is_zero(args[0])
        and args[1] == 1
        and known_equal(value_of(indices).shape[0], rows[0])
        and same_shape(indices, args[3])
        and same_sizes(value_of(unpool).shape, rows)
    )
    return pool if fits else None


def _is_mask(mask: Any, y: fx.Node) -> bool:
    """Whether ``mask`` says of each element whether that of ``y`` is in certain intervals."""
    if mask.target in _LOGIC:
        return all(_is_mask(a, y) for a in mask.args)
    if mask.target not in COMPARISONS:
        return False
    operand = operand_of(mask.args[0])
    # The activation whose result is y, which may be a cast in half precision.
    makers = [y, *(y.all_input_nodes if layers.is_cast(y) else ())]
    found = [a for a in map(activation_at, makers) if a is not None and a.y is y]
    of_z = any(operand is a.z and (mask.target, mask.args[1]) in a.same for a in found)
    return operand is y or of_z


def _mask_of(mask: Any, p: fx.Node, build: Builder) -> fx.Node:
    """``mask`` with ``p`` for what it is of."""
    if mask.target in _LOGIC:
        return build.call(mask.target, *(_mask_of(a, p, build) for a in mask.args))
    operand, constant = mask.args
    return build.call(mask.target, build.cast(p, value_of(operand).dtype), constant)
