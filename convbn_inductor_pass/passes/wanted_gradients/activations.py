"""Rule 2: the mask of an activation from its output, if that is saved anyway.

Before:  dz = where(z <= 0 or z >= 6, 0, dy)      saves y = clamp(z, 0, 6), and a mask, in bytes
After:   dz = where(y <= 0 or y >= 6, 0, dy)      saves y

A comparison of z with a constant is one of y for every z, infinities and NaN included:

* ``y = clamp(z, lo, hi)`` with lo < hi (hardtanh, ReLU6): ``z <= lo``, ``z > lo``, ``z >= hi``,
  ``z < hi``. Not ``z >= lo``, with which ``torch.clamp`` makes its gradient up to 2.13: y = lo on
  both sides.
* ``y = where(z > 0, z, s * z)`` with s > 0 (leaky ReLU, randomized leaky ReLU in eval mode):
  ``z > 0``, ``z <= 0``. Not ``z < 0``: where s * z underflows, y is -0.
* ``y = where(z <= t, v, z)`` with v <= t (threshold): ``z <= t``, ``z > t``.

Constants have to be representable in y's dtype, so that rounding y moves nothing across them.
Declines where the output is not saved, or where the input is.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import fx

from ...codes import Code
from ...graph import layers
from ...graph.builder import Builder
from ...graph.layers import numel_of, same_shape, tensor_of, value_of
from ...graph.uses import users_of
from .site import JointGraph, Site

aten = torch.ops.aten

_LE, _LT = aten.le.Scalar, aten.lt.Scalar
_GE, _GT = aten.ge.Scalar, aten.gt.Scalar
COMPARISONS = (_LE, _LT, _GE, _GT)


class Activation(NamedTuple):
    """``y = f(z)``, and the comparisons of z with constants that are those of y.

    ``z`` and ``y`` have the same dtype; in half precision f may compute in float32 in between.
    """

    z: fx.Node
    y: fx.Node
    same: frozenset[tuple[Any, float]]


def find_sites(joint: JointGraph) -> Iterator[Site]:
    """Activations whose backward compares their input."""
    activations = (activation_at(n) for n in joint.graph.nodes if n in joint.forward)
    for z, y, same in (a for a in activations if a is not None):
        # Of z, its aliases, copies and exact casts.
        users = users_of(z, lambda u: u.op == "call_function" and operand_of(u) is not u)
        in_backward = [u for u in users if u not in joint.forward]
        compared = [u for u in in_backward if u.target in COMPARISONS]
        calls = tuple(u for u in compared if (u.target, u.args[1]) in same)
        if not calls:
            continue
        code, detail = Code.MASK_FROM_OUTPUT, str(y)
        if len(calls) < len(in_backward) or joint.has(z, calls):
            code, detail = Code.SAVED_ANYWAY, str(z)
        elif not joint.reads(y):
            code = Code.OUTPUT_NOT_SAVED
        yield Site("activation", y, code, detail, numel_of(y), calls)  # a byte each


def rewrite(build: Builder, call: fx.Node, site: Site) -> None:
    """Compare the activation's output, which is the site's tensor, in the place of its input."""
    y = build.cast(site.node, value_of(call.args[0]).dtype)
    build.replace(call, build.call(call.target, y, call.args[1]))


def activation_at(node: fx.Node) -> Activation | None:
    """The activation that ``node`` computes, if it is one of those above."""
    match node:
        case fx.Node(
            target=aten.clamp_max.default,
            args=(fx.Node(target=aten.clamp_min.default, args=(x, lo)), hi),
        ) if _is_number(lo) and _is_number(hi) and lo < hi:
            constants, same = [lo, hi], {(_LE, lo), (_GT, lo), (_GE, hi), (_LT, hi)}
        case fx.Node(
            target=aten.where.self,
            args=(
                fx.Node(target=aten.gt.Scalar, args=(x, 0)),
                kept,
                fx.Node(target=aten.mul.Tensor, args=(scaled, slope)),
            ),
        ) if kept is x and scaled is x and _is_number(slope) and 0 < slope < math.inf:
            constants, same = [], {(_LE, 0), (_GT, 0)}
        case fx.Node(
            target=aten.where.self,
            args=(fx.Node(target=aten.le.Scalar, args=(x, t)), value, kept),
        ) if kept is x and _is_number(v := constant_of(value)) and _is_number(t) and v <= t:
            constants, same = [v, t], {(_LE, t), (_GT, t)}
        case _:
            return None
    z = operand_of(x)
    dtype = value_of(z).dtype
    # In half precision it may compute in float32, and cast the result back.
    results = [node, *(u for u in node.users if layers.is_cast(u))]
    y = next((n for n in results if value_of(n).dtype == dtype), None)
    if y is None or not same_shape(z, y):
        return None
    if not all(torch.tensor(c, dtype=dtype).item() == c for c in constants):
        return None
    return Activation(z, y, frozenset(same))


def constant_of(node: Any) -> float | None:
    """The number that every element of a tensor is, if the graph says so."""
    place = {aten.scalar_tensor.default: 0, aten.full.default: 1}.get(node.target)
    value = None if place is None else node.args[place]
    return value if _is_number(value) else None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def operand_of(node: Any) -> fx.Node:
    """What ``node`` has the values of: less aliases, copies, and casts to a wider dtype.

    An activation that is computed in place saves a copy of its input.
    """
    while node.target in (aten.alias.default, aten.clone.default) or is_exact_cast(node):
        (node,) = node.all_input_nodes
    return node


def is_exact_cast(node: fx.Node) -> bool:
    """Whether ``node`` widens half precision to float32."""
    before = tensor_of(node.all_input_nodes[0]) if layers.is_cast(node) else None
    is_half = before is not None and before.dtype in (torch.float16, torch.bfloat16)
    return is_half and value_of(node).dtype == torch.float32
