"""
Masks of clamp-like activations, from their output where backward has it anyway.

The gradient of relu is masked by its result, those of hardtanh, relu6, clamp and
leaky_relu by comparisons of their input with constants. If the input is not kept, a
mask of a byte per element is saved for backward beside the output, which the next layer
saves for its weight's gradient. For these functions a comparison of the input is one of
the output:

    y = hardtanh(x, 0, 6)                       y = hardtanh(x, 0, 6)
    dx = where((x <= 0) | (x >= 6), 0, dy)  =>  dx = where((y <= 0) | (y >= 6), 0, dy)

The masks are the same in every bit, for infinities, NaN and signed zeros, too. Nothing is
saved that was not saved before, for y is there in backward.
"""

import math
from typing import NamedTuple

import torch
from torch._dynamo.utils import counters
from torch.fx import Graph, Node
from torch.utils._ordered_set import OrderedSet
from torch.utils._python_dispatch import _disable_current_modes

aten = torch.ops.aten
prims = torch.ops.prims

_LE, _LT = aten.le.Scalar, aten.lt.Scalar
_GE, _GT = aten.ge.Scalar, aten.gt.Scalar


class _Activation(NamedTuple):
    x: Node
    # Comparisons of x with constants, which are those of the result
    comparisons: tuple[tuple[torch._ops.OpOverload, float], ...]
    constants: tuple[float, ...]


def mask_from_output(graph: Graph) -> int:
    """Take masks from outputs in a joint graph; returns how many comparisons."""
    backward = OrderedSet[Node]()
    for node in graph.nodes:
        is_tangent = node.op == "placeholder" and "tangents" in node.name
        if is_tangent or any(n in backward for n in node.all_input_nodes):
            backward.add(node)
    if not backward:
        return 0

    count = 0
    for node in graph.nodes:
        activation = _clamp(node) or _leaky_relu(node)
        if activation is None:
            continue
        x, outputs = activation.x, [node]
        if _is_widening(x):
            # Computed in float32, given in the dtype of the input
            (x,) = x.all_input_nodes
            outputs = [u for u in node.users if _dtype(u) == _dtype(x) and _is_cast(u)]
        if not _are_exact(activation.constants, _dtype(x)):
            continue
        for y in outputs:
            # For more than a mask, which does not depend on a gradient
            if any(user in backward for user in y.users):
                count += _compare(y, x, activation)
    counters["inductor"]["mask_from_output"] += count
    return count


def _compare(y: Node, x: Node, activation: _Activation) -> int:
    """Have comparisons of x, which may be cast to float32, compare y; returns how many."""
    count = 0
    for user in list(x.users):
        if user < y:  # y may be computed from it
            continue
        compared = list(user.users) if _is_widening(user) else [user]
        if all((u.target, *u.args[1:]) in activation.comparisons for u in compared):
            user.replace_input_with(x, y)
            count += len(compared)
    return count


def _clamp(node: Node) -> _Activation | None:
    """clamp, hardtanh and relu6, or one side of them, with numbers for bounds."""
    x, bounds, same = node, [], []
    for op, comparisons in (
        (aten.clamp_max.default, (_GE, _LT)),
        (aten.clamp_min.default, (_LE, _GT)),
    ):
        if x.target is op:
            x, bound = x.args
            bounds.append(bound)
            same += [(comparison, bound) for comparison in comparisons]
    if not bounds or not all(isinstance(b, (int, float)) for b in bounds):
        return None
    if len(bounds) == 2 and not bounds[0] > bounds[1]:
        return None
    return _Activation(x, tuple(same), tuple(bounds))


def _leaky_relu(node: Node) -> _Activation | None:
    """where(x > 0, x, slope * x) with a positive slope."""
    if node.target is not aten.where.self:
        return None
    condition, x, scaled = node.args
    if condition.target is not _GT or condition.args != (x, 0):
        return None
    if scaled.target is not aten.mul.Tensor or scaled.args[0] is not x:
        return None
    slope = scaled.args[1]
    if not isinstance(slope, (int, float)) or not 0 < slope < math.inf:
        return None
    # Not x < 0: where slope * x underflows, the result is -0
    return _Activation(x, ((_GT, 0), (_LE, 0)), ())


def _is_cast(node: Node) -> bool:
    return node.target is prims.convert_element_type.default


def _is_widening(node: Node) -> bool:
    if not _is_cast(node) or _dtype(node) != torch.float32:
        return False
    return _dtype(node.args[0]) in (torch.float16, torch.bfloat16)


def _dtype(node: Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def _are_exact(constants: tuple[float, ...], dtype: torch.dtype | None) -> bool:
    """Whether rounding to dtype moves no value across one of the constants."""
    if dtype is None or not dtype.is_floating_point:
        return False
    with _disable_current_modes():
        return all(torch.tensor(c, dtype=dtype).item() == c for c in constants)
