"""What the passes know of aten IR: layers, per-channel operands, and steps of an affine map."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, fx

from .._torch import compat
from .layout import Layout

aten = torch.ops.aten
prims = torch.ops.prims

_CASTS = (prims.convert_element_type.default, aten._to_copy.default)
# The same elements in the same order, in other dimensions.
RESHAPES = (
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.alias.default),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims),
)
_MATMULS = (aten.mm.default, aten.addmm.default)
_MULTIPLICATIONS = (aten.mul.Tensor, aten.mul.Scalar)
_DIVISIONS = (aten.div.Tensor, aten.div.Scalar)
_ADDITIONS = (aten.add.Tensor, aten.add.Scalar)
_SUMS = (*_ADDITIONS, aten.sub.Tensor, aten.sub.Scalar)

# What a layer of each dtype may meet: in half precision, values per channel are float32 at most.
DTYPES_TOGETHER = {d: {d, torch.float32} for d in (torch.float16, torch.bfloat16, torch.float32)}
DTYPES_TOGETHER[torch.float64] = {torch.float64}


def tensor_of(node: Any) -> Tensor | None:
    """The fake tensor that a node stands for, if it stands for one."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def value_of(node: Any) -> Tensor:
    """The fake tensor that a node stands for; a ValueError if it stands for none."""
    tensor = tensor_of(node)
    if tensor is None:
        raise ValueError(f"{node} has no metadata")
    return tensor


def numel_of(node: Any) -> int:
    """The number of elements of a tensor, with hints for symbolic sizes; 0 if there is none."""
    tensor = tensor_of(node)
    return 0 if tensor is None else compat.size_hint(tensor.numel())


def bytes_of(node: Any) -> int:
    """The size of a tensor in bytes, with hints for symbolic sizes; 0 if there is none."""
    tensor = tensor_of(node)
    return 0 if tensor is None else numel_of(node) * tensor.element_size()


def known_equal(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for every input; a size that is only a hint is not."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return compat.surely(a == b)


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are equal for every input; ``==`` would make a guard, or raise."""
    return len(a) == len(b) and all(map(known_equal, a, b))


def same_shape(a: Any, b: Any) -> bool:
    """Whether two nodes stand for tensors of :func:`same_sizes`."""
    x, y = tensor_of(a), tensor_of(b)
    return x is not None and y is not None and same_sizes(x.shape, y.shape)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution or matrix product ``node``: ``out = x * W (+ bias)``.

    A product's weight is the right-hand matrix [C_in, C_out], whatever made it. The output channels
    lie in the weight as ``layout`` says, and are dimension ``dim`` of the output.
    """

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    layout: Layout
    dim: ClassVar[int] = 1

    @property
    def is_conv(self) -> bool:
        return self.node.target is aten.convolution.default

    @property
    def out(self) -> Tensor:
        return value_of(self.node)


def layer_of(node: fx.Node) -> Layer | None:
    """The layer that ``node`` calls; None for anything else, an unbatched convolution included."""
    out = tensor_of(node)
    if node.op != "call_function" or out is None:
        return None
    args: Any = node.args
    if node.target is aten.convolution.default:
        x, weight, bias, *_, transposed, _, groups = args
        ranks = [t.ndim for t in map(tensor_of, (x, weight)) if t is not None]
        if ranks != [out.ndim, out.ndim] or not isinstance(groups, int) or node.kwargs:
            return None
        return Layer(node, x, weight, bias, Layout(bool(transposed), groups))
    if node.target in _MATMULS:
        bias, x, weight = args if len(args) == 3 else (None, *args)
        if any(v != 1 for v in node.kwargs.values()):
            return None
        if bias is not None and operand_per_channel(bias, out.shape, 1) is None:
            return None
        # Laid out as a transposed convolution's weight without kernel: [C_in, C_out].
        return Layer(node, x, weight, bias, Layout(transposed=True))
    return None


Operand = fx.Node | int | float
"""What a step adds or multiplies: a tensor of 1 or C elements, in any shape; or a number."""


def operand_per_channel(value: Any, shape: Sequence[Any], dim: int) -> Operand | None:
    """``value`` as an operand for a tensor of ``shape``, if it varies along ``dim`` at most.

    An operand that has the shape of an activation only because it was expanded counts too.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    tensor = tensor_of(value)
    if tensor is None:
        return None
    node, axis = value, dim - len(shape) + tensor.ndim  # where broadcasting puts the channels
    if tensor.ndim > len(shape):
        return None
    while node.target is aten.expand.default:
        node, inner = node.args[0], tensor_of(node.args[0])
        if inner is None:
            return None
        axis, tensor = axis + inner.ndim - tensor.ndim, inner
    others = [size for i, size in enumerate(tensor.shape) if i != axis]
    along = tensor.shape[axis] if axis >= 0 else 1
    if not all(known_equal(size, 1) for size in others):
        return None
    if not known_equal(along, 1) and not known_equal(along, shape[dim]):
        return None
    while node.target in RESHAPES and tensor_of(node.args[0]) is not None:
        node = node.args[0]  # the same elements in the same order
    return node


def without_casts(node: fx.Node) -> fx.Node:
    """The widest tensor that ``node`` was cast down from, as autocast does with parameters."""
    while is_cast(node):
        source = node.all_input_nodes[0]
        before, after = value_of(source).dtype, value_of(node).dtype
        is_down = before.is_floating_point and before.itemsize >= after.itemsize
        if not is_down or before == torch.float64:
            break
        node = source
    return node


def is_cast(node: fx.Node) -> bool:
    """Whether ``node`` gives the elements of another tensor in a floating-point dtype."""
    if node.target is aten._to_copy.default and set(node.kwargs) - {"dtype"}:
        return False
    tensor = tensor_of(node)
    return node.target in _CASTS and tensor is not None and tensor.dtype.is_floating_point


Kind = Literal["scale", "divide", "shift", "cast", "move"]


class Step(NamedTuple):
    """One operation ``y = step(x)`` that is affine per channel: the call ``node``, or a part of it.

    ``kind`` is ``x * o``, ``x / o``, ``x + factor * o`` with the ``operand`` o, a cast, or a call
    that moves the elements. Channels are the dimension ``dim`` of y.
    """

    node: fx.Node
    kind: Kind
    dim: int
    operand: Operand | None = None
    factor: int | float = 1


def read_step(node: fx.Node, of: fx.Node, dim: int) -> Sequence[Step] | None:
    """The steps of ``node``, whose input ``of`` has its channels in ``dim``.

    None if it is not affine per channel, or uses ``of`` twice.
    """
    before, after = tensor_of(of), tensor_of(node)
    if node.op != "call_function" or before is None or after is None:
        return None
    target, args, kwargs = node.target, node.args, node.kwargs
    if sum(a is of for a in args) != 1 or of in kwargs.values():
        return None
    if target in _CASTS:
        return [Step(node, "cast", dim)] if is_cast(node) else None
    moved = _moved(node, before, after, dim)
    if moved is not None:
        return [Step(node, "move", moved)]
    if not after.dtype.is_floating_point or not same_sizes(after.shape, before.shape):
        return None

    operands: list[Any] = [operand_per_channel(a, before.shape, dim) for a in args if a is not of]
    constant = kwargs.get("alpha", kwargs.get("value", 1))
    if None in operands or not isinstance(constant, (int, float)):
        return None
    if target is aten.neg.default:
        return [Step(node, "scale", dim, -1)]
    if not operands:
        return None
    comes_first, (o, *more) = args[0] is of, operands
    found: list[tuple[Any, ...]] = []
    if target in _MULTIPLICATIONS:
        found = [("scale", o)]
    elif target in _DIVISIONS and comes_first and not kwargs:
        found = [("divide", o)]
    elif target in _SUMS and not more:
        constant = constant if target in _ADDITIONS else -constant
        found = [("shift", o, constant)] if comes_first else [("scale", constant), ("shift", o)]
    elif target is aten.addcmul.default and not comes_first:
        found = [("scale", *more), ("scale", constant), ("shift", o)]
    return [Step(node, kind, dim, *by) for kind, *by in found] or None


def _moved(node: fx.Node, before: Tensor, after: Tensor, dim: int) -> int | None:
    """Where a view's channels are that were in ``dim`` of its input; None if they got mixed."""
    if node.target is aten.permute.default:
        dims: Any = node.args[1]
        return [d % before.ndim for d in dims].index(dim)
    if node.target is aten.clone.default:
        return dim
    if node.target not in RESHAPES:
        return None

    # What is left and right of the channels may be split and joined, the channels may not.
    left, right = dim + 1, before.ndim - dim  # sizes up to the channels, and from them on
    if same_sizes(before.shape[:left], after.shape[:left]):
        return dim
    if after.ndim >= right and same_sizes(before.shape[dim:], after.shape[after.ndim - right :]):
        return after.ndim - right
    return None
