"""Rule 3: the mask of an activation before max-pooling, from what is pooled.

Before, for ``p, i = max_pool(y)`` with ``y = relu(z)``:

    dz = where(y <= 0, 0, scatter(dp, i))       saves a mask of y's size

After:

    dz = scatter(where(p <= 0, 0, dp), i)       saves one of p's size, or none if p is saved

Equal to the bit: a gradient reaches only the position i of a window, whose value in y is p, and
what reaches one position from overlapping windows is masked alike. Ties, NaN and windows of zeros
included: whatever i is, y's value there is p. Positions that no window names get 0 both ways.

So for every mask that is made of comparisons of y with constants, or of comparisons of z that are
such ones (:mod:`activations`).

Declines where y, or what it is computed from, is there in backward anyway, so that its mask is
recomputed.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any

import torch
from torch import fx

from ...codes import Code
from ...graph import layers
from ...graph.builder import Builder
from ...graph.layers import bytes_of, known_equal, same_sizes, tensor_of, value_of
from ...graph.uses import is_available, read_in_backward
from .activations import COMPARISONS, Activation, activation_at, constant_of, operand_of
from .shapes import shape_readers
from .site import JointGraph, Site

__all__ = ["find_sites", "rewrite"]

aten = torch.ops.aten
prims = torch.ops.prims

_POOLS = (
    aten.max_pool2d_with_indices.default,
    aten.max_pool3d_with_indices.default,
    aten.adaptive_max_pool2d.default,
    aten.adaptive_max_pool3d.default,
    prims._low_memory_max_pool_with_offsets.default,
)
_POOL_BACKWARDS = (
    aten.max_pool2d_with_indices_backward.default,
    aten.max_pool3d_with_indices_backward.default,
    aten.adaptive_max_pool2d_backward.default,
    aten.adaptive_max_pool3d_backward.default,
)
_LOGIC = (
    aten.bitwise_or.Tensor,
    aten.bitwise_and.Tensor,
    aten.logical_or.default,
    aten.logical_and.default,
)


@dataclasses.dataclass(frozen=True)
class _Unpooling:
    """``where(mask, 0, scatter(dp))`` or the like.

    Attributes:
        where: the masking.
        scattered: its operand that is not zero: ``path`` of ``unpool``.
        gradient: ``dp``.
        forward_path: how ``gradient`` becomes what ``unpool`` takes: calls, first to last.
        unpool: the scatter.
        path: how its result becomes ``scattered``.
        pooled: ``p``.
        y: what is pooled, which the mask is of.
    """

    where: fx.Node
    mask: fx.Node
    scattered: fx.Node
    gradient: fx.Node
    forward_path: tuple[fx.Node, ...]
    unpool: fx.Node
    path: tuple[fx.Node, ...]
    pooled: fx.Node
    y: fx.Node


def find_sites(joint: JointGraph) -> list[Site]:
    """Masks of what is pooled, on the gradient that pooling's backward gives."""
    readers = shape_readers(joint)
    sites = []
    for node in joint.graph.find_nodes(op="call_function", target=aten.where.self):
        found = _unpooling_at(node) if node in joint.backward else None
        if found is None:
            continue
        code, detail = Code.MASK_AFTER_POOLING, str(found.pooled)
        others = {found.unpool, *readers}
        if (denied := joint.denied(found.y)) is not None:
            code, detail = Code.DENIED, denied
        elif is_available(found.y, joint.forward, others):
            code, detail = Code.SAVED_ANYWAY, str(found.y)
        saved = read_in_backward(found.pooled, joint.forward, readers)
        numel = [bytes_of(n) // value_of(n).element_size() for n in (found.y, found.pooled)]
        nbytes = numel[0] - (0 if saved else numel[1])
        sites.append(Site("pooling", found.y, code, detail, nbytes, (node,)))
    return sites


def rewrite(build: Builder, call: fx.Node, site: Site) -> None:
    """Mask the pooled gradient, and scatter that."""
    found = _unpooling_at(call)
    if found is None:
        raise AssertionError(f"{call} was found to mask what is pooled, and is not there any more")
    mask = _mask_of(found.mask, found.pooled, build)
    dp = found.gradient
    zero = build.call(
        aten.full.default, [], 0, dtype=value_of(dp).dtype, device=value_of(dp).device
    )
    masks_where = found.where.args[2] is found.scattered
    value = build.call(aten.where.self, mask, *((zero, dp) if masks_where else (dp, zero)))
    for step in found.forward_path:
        value = _again(build, step, step.args[0], value)
    value = _again(build, found.unpool, _gradient_of(found.unpool), value)
    for step in found.path:
        value = _again(build, step, step.args[0], value)
    call.replace_all_uses_with(value)


def _again(build: Builder, call: fx.Node, old: Any, new: fx.Node) -> fx.Node:
    """``call`` with ``new`` for its argument ``old``."""
    # Strides may have changed; the order of elements has not.
    is_view = call.target in (aten.view.default, aten._unsafe_view.default)
    target = aten.reshape.default if is_view else call.target
    return build.call(target, *(new if a is old else a for a in call.args), **call.kwargs)


def _unpooling_at(where: fx.Node) -> _Unpooling | None:
    args: Any = where.args
    mask, *values = args
    scattered = [v for v in values if not _is_zero(v)]
    if len(scattered) != 1 or not isinstance(scattered[0], fx.Node):
        return None
    result, operand = value_of(where), value_of(scattered[0])
    if operand.dtype != result.dtype or not same_sizes(operand.shape, result.shape):
        return None  # where() casts or broadcasts
    unpool, path = _without_reshapes(scattered[0], casts=True)
    source: Any = _gradient_of(unpool)
    pool = None if source is None else _pool_of(unpool)
    if pool is None:
        return None
    y = _pooled_values(pool)
    pooled = next((u for u in pool.users if u.target is operator.getitem and u.args[1] == 0), None)
    if pooled is None or not same_sizes(value_of(y).shape, value_of(where).shape):
        return None
    forward_path: list[fx.Node] = []
    while not same_sizes(value_of(source).shape, value_of(pooled).shape):
        if not _keeps_order(source) and not layers.is_cast(source):
            return None
        forward_path.insert(0, source)
        source = source.args[0]
    if not _is_mask_of(mask, y):
        return None
    return _Unpooling(
        where, mask, scattered[0], source, tuple(forward_path), unpool, tuple(path), pooled, y
    )


def _is_zero(node: Any) -> bool:
    """Whether every element is +0, which a masked gradient and an empty scatter have."""
    value = constant_of(node)
    return value == 0 and math.copysign(1, value) > 0


def _without_reshapes(node: Any, *, casts: bool = False) -> tuple[fx.Node, list[fx.Node]]:
    """What ``node`` holds the elements of in the same order, and the calls from there to it."""
    path: list[fx.Node] = []
    while _keeps_order(node) or (casts and layers.is_cast(node)):
        path.insert(0, node)
        node = node.args[0]
    return node, path


def _pooled_values(pool: fx.Node) -> fx.Node:
    """What ``pool`` takes, less what changes neither values nor their order."""
    node: Any = pool.args[0]
    while (inner := operand_of(_without_reshapes(node)[0])) is not node:
        node = inner
    return node


def _keeps_order(node: Any) -> bool:
    """Whether the elements of ``node`` are those of its input, in the same order."""
    if layers.is_reshape(node):
        return True
    return isinstance(node, fx.Node) and node.target is aten.clone.default


def _gradient_of(unpool: fx.Node) -> fx.Node | None:
    """What is scattered."""
    position = 0 if unpool.target in _POOL_BACKWARDS else 3
    is_known = unpool.target in (*_POOL_BACKWARDS, aten.scatter_add.default)
    return unpool.args[position] if is_known else None  # type: ignore[return-value]


def _pool_of(unpool: fx.Node) -> fx.Node | None:
    """The pooling whose indices say where ``unpool`` scatters to; None if it is not sure."""
    if unpool.target is aten.scatter_add.default:
        zeros, dim, indices, source = unpool.args
        if not _is_zero(zeros) or dim != 1:
            return None
        if not same_sizes(value_of(indices).shape, value_of(source).shape):
            return None
    else:
        indices = unpool.args[-1]
    node, _ = _without_reshapes(indices)
    is_offsets = node.target is prims._low_memory_max_pool_offsets_to_indices.default
    if is_offsets:
        node = node.args[0]  # type: ignore[assignment]
    if node.target is not operator.getitem or node.args[1] != 1:
        return None
    pool: Any = node.args[0]
    if pool.target not in _POOLS:
        return None
    shape = value_of(pool.args[0]).shape
    if unpool.target is aten.scatter_add.default:
        # Indices count the positions of one channel of one image, which is a row here.
        spatial = _rank(pool)
        rows = [_product(shape[:-spatial]), _product(shape[-spatial:])]
        all_rows = known_equal(value_of(indices).shape[0], rows[0])
        return pool if all_rows and same_sizes(value_of(unpool).shape, rows) else None
    given = value_of(unpool.args[1]).shape
    return pool if same_sizes(given, shape) else None


def _rank(pool: fx.Node) -> int:
    """Number of dimensions that are pooled over."""
    if pool.target in (aten.max_pool3d_with_indices.default, aten.adaptive_max_pool3d.default):
        return 3
    if pool.target is prims._low_memory_max_pool_with_offsets.default:
        return len(pool.args[1])  # type: ignore[arg-type]
    return 2


def _product(sizes: Any) -> Any:
    result = 1
    for size in sizes:
        result = result * size
    return result


def _is_mask_of(mask: Any, y: fx.Node) -> bool:
    """Whether ``mask`` says of each element whether that of ``y`` is in certain intervals."""
    if not isinstance(mask, fx.Node):
        return False
    if mask.target in _LOGIC:
        return all(_is_mask_of(a, y) for a in mask.args)
    if mask.target not in COMPARISONS or tensor_of(mask.args[0]) is None:
        return False
    operand = operand_of(mask.args[0])  # type: ignore[arg-type]
    if operand is y:
        return True
    activation = _activation_giving(y)
    if activation is None or operand is not activation.z:
        return False
    return (mask.target, mask.args[1]) in activation.same


def _activation_giving(y: fx.Node) -> Activation | None:
    """The activation whose result is ``y``, which may be a cast in half precision."""
    made_by = [y, *(y.all_input_nodes[:1] if layers.is_cast(y) else ())]
    found = [a for a in map(activation_at, made_by) if a is not None and a.y is y]
    return found[0] if found else None


def _mask_of(mask: fx.Node, p: fx.Node, build: Builder) -> fx.Node:
    """``mask`` with ``p`` for what it is of."""
    if mask.target in _LOGIC:
        return build.call(mask.target, *(_mask_of(a, p, build) for a in mask.args))  # type: ignore[arg-type]
    operand, constant = mask.args
    return build.call(mask.target, build.cast(p, value_of(operand).dtype), constant)
