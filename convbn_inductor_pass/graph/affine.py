"""Recognise what follows a layer as one affine map per channel, by meaning, and compute it.

    out = layer(x, W, b);  y = chain(out)   =>   y = layer(x, s * W, chain(b))

A batch norm in eval mode, a frozen batch norm in any spelling, a layer scale, a bias added by
hand, and any sequence of them, is a chain of steps ``v * o``, ``v / o``, ``v + o``, ``o - v``,
``-v`` whose operands vary along the channels at most. Composing them needs no algebra: the
shift is what the chain makes of the bias, the scale is what its multiplications make of one.
Both are computed from the live operands in each call, in float32 or wider.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import fx

from . import layers
from .builder import Builder
from .layers import Layer, Operand, Step, tensor_of
from .layout import views_onto_output_axis

__all__ = [
    "AffineChain",
    "emit_scale",
    "emit_scale_and_shift",
    "emit_scaled_weight",
    "emit_shift",
    "find_chains",
    "constants_fit",
    "wide_dtype",
]

aten = torch.ops.aten


_SCALING = ("scale", "divide", "negate", "subtract_from")


@dataclasses.dataclass(frozen=True)
class AffineChain:
    """A layer and the longest affine chain that follows it.

    Attributes:
        layer: the layer.
        steps: what happens to its output, in order; may be empty.
    """

    layer: Layer
    steps: tuple[Step, ...]

    @property
    def last(self) -> fx.Node:
        """The node whose result the chain gives."""
        return self.steps[-1].node if self.steps else self.layer.node

    @property
    def scales(self) -> bool:
        """Whether the weight has to be scaled."""
        return any(s.kind in _SCALING and s.operand != Operand(number=1) for s in self.steps)

    @property
    def scaling_operands(self) -> tuple[fx.Node, ...]:
        """Nodes that the scale is computed from."""
        operands = [s.operand for s in self.steps if s.kind in ("scale", "divide")]
        return tuple(o.node for o in operands if o is not None and o.node is not None)

    @property
    def shifts(self) -> bool:
        """Whether a shift is added."""
        return any(s.kind in ("shift", "subtract_from") for s in self.steps)


def find_chains(graph: fx.Graph) -> Iterator[AffineChain]:
    """Every layer of ``graph`` in order, with the affine chain that follows it.

    No call is a step of two chains. Where two layers' outputs are added that are one number per
    channel, as for a batch of one, the addition could be: each output is an operand of the other.
    """
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        layer = layers.layer_of(node)
        if layer is not None:
            chain = _follow(layer, taken)
            taken.update(step.node for step in chain.steps)
            yield chain


def _follow(layer: Layer, taken: set[fx.Node]) -> AffineChain:
    steps: list[Step] = []
    node, dim = layer.node, layer.dim
    while len(node.users) == 1:
        (user,) = node.users
        found = layers.read_step(user, node, dim)
        if found is None or user in taken:
            break
        steps += found
        node, dim = user, found[-1].dim
    # Casts and views at the end belong to what comes next, but for the cast back to the dtype in
    # which the layer computes.
    affine = [i for i, s in enumerate(steps) if s.kind not in ("cast", "move")]
    end = affine[-1] + 1 if affine else 0
    if end and end < len(steps) and steps[end].kind == "cast":
        after = tensor_of(steps[end].node)
        end += after is not None and after.dtype == layer.out.dtype
    return AffineChain(layer, tuple(steps[:end]))


# float32 reaches from 1e-38 to 3e38; this leaves room for the weights.
_RANGE = (1e-30, 1e30)


def constants_fit(chain: AffineChain) -> bool:
    """Whether the constants in the chain, multiplied with each other, stay numbers of float32.

    As written they need not: what is scaled by 1e-20 twice may have been large.
    """

    def fits(value: float) -> bool:
        return value == 0 or _RANGE[0] <= abs(value) <= _RANGE[1]  # not a NaN either

    scale, shift = 1.0, 0.0
    for step in chain.steps:
        number = None if step.operand is None or step.reads_a_tensor else step.operand.number
        if number == 0 and step.kind == "divide":
            return False
        by = {"scale": number, "divide": number, "subtract_from": step.factor}.get(step.kind)
        by = 1 if by is None else 1 / by if step.kind == "divide" else by
        scale, shift = scale * by, shift * by
        if number is not None and step.kind in ("shift", "subtract_from"):
            shift += number * step.factor
        if not (fits(scale) and fits(shift)):
            return False
    return True


def emit_scale_and_shift(
    chain: AffineChain, build: Builder
) -> tuple[fx.Node | None, fx.Node | None]:
    """Nodes [C] of the chain's scale and shift, at the builder's insertion point.

    Each is None where it is one, or zero. They are computed as the chain is written, in
    float32 (float64 if the layer computes in it).
    """
    scale = emit_scale(chain.layer, chain.steps, build)
    return scale, emit_shift(chain.layer, chain.steps, build, narrowed=False)


def emit_scale(layer: Layer, steps: Sequence[Step], build: Builder) -> fx.Node | None:
    """A node [C] of the scale that is made by ``steps`` alone; None where it is one."""
    if not AffineChain(layer, tuple(steps)).scales:
        return None
    emit = _Emitter(build, layer, wide_dtype(layer))
    return emit.full_vector(emit.replay(steps, 1.0, linear=True))


def emit_shift(
    layer: Layer, steps: Sequence[Step], build: Builder, *, narrowed: bool = True
) -> fx.Node | None:
    """A node [C] of what ``steps`` make of the layer's bias; None for zero.

    The bias is as it is added, or, with ``narrowed`` False, as it was before autocast's cast.
    """
    if layer.bias is None and not AffineChain(layer, tuple(steps)).shifts:
        return None
    emit = _Emitter(build, layer, wide_dtype(layer))
    start: Value = 0.0
    if layer.bias is not None:
        bias = layer.bias if narrowed else layers.without_casts(layer.bias)
        start = emit.vector(_bias_operand(layer, bias))
    return emit.full_vector(emit.replay(steps, start, linear=False))


def emit_scaled_weight(
    layer: Layer, scale: fx.Node | None, build: Builder, weight: fx.Node | None = None
) -> fx.Node:
    """A node of the weight, or of the same one in ``weight``, times ``scale`` [C_out].

    In the scale's dtype, or :func:`wide_dtype` where it is None, which stands for one.
    """
    weight = layers.without_casts(layer.weight) if weight is None else weight
    value, wide = tensor_of(weight), tensor_of(scale)
    if value is None:
        raise AssertionError(f"{layer.node} has no metadata")
    weight = build.cast(weight, wide_dtype(layer) if wide is None else wide.dtype)
    if scale is None:
        return weight
    for view, sizes in views_onto_output_axis(value.shape, layer.layout):
        scale = build.call(getattr(aten, view).default, scale, sizes)
    return build.call(aten.mul.Tensor, weight, scale)


def wide_dtype(layer: Layer) -> torch.dtype:
    """What a layer's numbers per channel are computed in: float32, or float64 where it does."""
    return torch.float64 if layer.out.dtype == torch.float64 else torch.float32


def _bias_operand(layer: Layer, bias: fx.Node) -> Operand:
    operand = layers.operand_per_channel(bias, layer.out.shape, layer.dim)
    # A convolution's bias [C] does not broadcast against its output as an operand would.
    return operand if operand is not None and not layer.is_conv else Operand(node=bias)


Value = fx.Node | float | int


class _Emitter:
    """Adds nodes that compute with numbers and vectors [C] (or [1], which broadcast)."""

    def __init__(self, build: Builder, layer: Layer, dtype: torch.dtype) -> None:
        self.call, self.cast = build.call, build.cast
        self.layer, self.dtype = layer, dtype

    def replay(self, steps: Sequence[Step], start: Value, *, linear: bool) -> Value:
        """What the steps make of ``start``; with ``linear`` only their multiplications."""
        value = start
        for step in steps:
            if step.kind == "negate":
                value = self.mul(value, -1)
            if step.operand is None:
                continue
            o = self.vector(step.operand)
            if step.kind == "scale":
                value = self.mul(value, o)
            elif step.kind == "divide":
                value = self.div(value, o)
            elif step.kind == "shift" and not linear:
                value = self.add(value, self.mul(o, step.factor))
            elif step.kind == "subtract_from":
                value = self.mul(value, -step.factor)
                value = value if linear else self.add(value, o)
        return value

    def vector(self, operand: Operand) -> Value:
        """An operand as a vector in the wide dtype; a number stays a number."""
        node, tensor = operand.node, tensor_of(operand.node)
        if node is None or tensor is None:
            return operand.number
        if tensor.ndim != 1:
            node = self.call(aten.reshape.default, node, [tensor.numel()])
        return self.cast(node, self.dtype)

    def full_vector(self, value: Value) -> fx.Node:
        """``value`` with one number per channel."""
        channels = self.layer.channels
        if not isinstance(value, fx.Node):
            return self.call(
                aten.full.default,
                [channels],
                value,
                dtype=self.dtype,
                device=self.layer.out.device,
                pin_memory=False,
            )
        tensor = tensor_of(value)
        if tensor is not None and not layers.known_equal(tensor.shape[0], channels):
            return self.call(aten.expand.default, value, [channels])
        return value

    def mul(self, a: Value, b: Value) -> Value:
        if not isinstance(a, fx.Node):
            a, b = b, a
        if not isinstance(a, fx.Node):
            return a * b  # type: ignore[operator]
        if not isinstance(b, fx.Node) and b in (0, 1):
            return a if b == 1 else 0.0
        return self.call(aten.mul.Tensor, a, b)

    def div(self, a: Value, b: Value) -> Value:
        if isinstance(a, fx.Node):
            return self.call(aten.div.Tensor, a, b)
        if isinstance(b, fx.Node):
            return a if a == 0 else self.mul(self.call(aten.reciprocal.default, b), a)
        return a / b

    def add(self, a: Value, b: Value) -> Value:
        if not isinstance(a, fx.Node):
            a, b = b, a
        if not isinstance(a, fx.Node):
            return a + b  # type: ignore[operator]
        return a if not isinstance(b, fx.Node) and b == 0 else self.call(aten.add.Tensor, a, b)
