"""Recognise the operations after a layer as one affine map per channel, and compute it.

    out = layer(x, W, b);  y = chain(out)   =>   y = layer(x, s * W, chain(b))

A chain has steps ``v * o``, ``v / o`` and ``v + o`` whose operands vary along the channels at most:
the shift is the chain applied to the bias, the scale is its multiplications applied to one. Both
are recomputed each call from the live operands, in float32 or wider.
"""

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from . import layers
from .builder import Builder
from .layers import Layer, Operand, Step, value_of
from .layout import Layout, onto_output_axis

aten = torch.ops.aten


class AffineChain(NamedTuple):
    """A layer, and what happens to its output, in order."""

    layer: Layer
    steps: tuple[Step, ...]

    @property
    def last(self) -> fx.Node:
        return self.steps[-1].node if self.steps else self.layer.node


def find_chains(
    graph: fx.Graph, ends_before: Callable[[fx.Node], object] = lambda node: False
) -> Iterator[AffineChain]:
    """Every layer of ``graph`` in order, with the longest affine chain that follows it.

    A chain ends before a call of which ``ends_before`` says so. No call is a step of two chains.
    """
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        layer = layers.layer_of(node)
        if layer is not None:
            chain = _follow(layer, lambda n: n in taken or ends_before(n))
            taken.update(step.node for step in chain.steps)
            yield chain


def _follow(layer: Layer, ends_before: Callable[[fx.Node], object]) -> AffineChain:
    steps: list[Step] = []
    node, dim = layer.node, layer.dim
    while len(node.users) == 1:
        (user,) = node.users
        found = layers.read_step(user, node, dim)
        if found is None or ends_before(user):
            break
        steps += found
        node, dim = user, found[-1].dim
    # Casts and views at the end belong to what comes next, but for the cast back to the dtype in
    # which the layer computes.
    affine = [i for i, s in enumerate(steps) if s.kind not in ("cast", "move")]
    end = affine[-1] + 1 if affine else 0
    if end and end < len(steps) and steps[end].kind == "cast":
        end += value_of(steps[end].node).dtype == layer.out.dtype
    return AffineChain(layer, tuple(steps[:end]))


def constants_fit(steps: Iterable[Step]) -> bool:
    """Whether products of a few of the constants are sure to fit in float32.

    As written, they need not: a value scaled by 1e-20 twice may have been large.
    """
    constants = ((s, s.operand) for s in steps)
    numbers = [(s.kind, abs(o * s.factor)) for s, o in constants if isinstance(o, (int, float))]
    return all(
        n <= 1e30 if kind == "shift" else 1e-6 <= n <= 1e6 or (kind, n) == ("scale", 0)
        for kind, n in numbers
    )


# How numbers and vectors are computed with, and what a vector need not be computed with.
_ARITHMETIC: dict[str, tuple[Callable[..., Operand], Any, int | None]] = {
    "scale": (operator.mul, aten.mul.Tensor, 1),
    "divide": (operator.truediv, aten.div.Tensor, None),
    "shift": (operator.add, aten.add.Tensor, 0),
}


class Emitter:
    """Adds nodes that compute with numbers and vectors [C] (or [1], which broadcast)."""

    def __init__(self, build: Builder, layer: Layer) -> None:
        self.build, self.layer = build, layer
        # Of values per channel: float32, or float64 where the layer computes in it.
        self.dtype = torch.float64 if layer.out.dtype == torch.float64 else torch.float32

    def scale(self, steps: Iterable[Step]) -> fx.Node | None:
        """A node [C] of the scale that is made by ``steps`` alone; None where it is one."""
        scale = self._replay((s for s in steps if s.kind != "shift"), 1.0)
        return None if scale == 1 else self._full_vector(scale)

    def shift(self, steps: Iterable[Step], *, narrowed: bool = True) -> fx.Node | None:
        """A node [C] of what ``steps`` make of the layer's bias; None where it is zero.

        The bias is as it is added, or, with ``narrowed`` False, as it was before autocast's cast.
        """
        layer = self.layer
        start: Operand = 0.0
        if layer.bias is not None:
            bias = layer.bias if narrowed else layers.without_casts(layer.bias)
            of_matmul = layers.operand_per_channel(bias, layer.out.shape[:2], layer.dim)
            start = self._vector(of_matmul or bias)
        shift = self._replay(steps, start)
        return None if shift == 0 else self._full_vector(shift)

    def scaled(
        self, weight: fx.Node, scale: fx.Node | None, layout: Layout, dtype: Any = None
    ) -> fx.Node:
        """``scale * weight`` along its output channels [C_out]; ``weight`` itself without a scale.

        Computed wide, and rounded once to ``dtype``, by default the weight's.
        """
        if scale is None:
            return self.build.current(weight)
        call, shape = self.build.call, value_of(weight).shape
        by_group, sizes = onto_output_axis(shape, layout)
        product = self.build.cast(weight, self.dtype)
        scale = call(aten.reshape.default, scale, sizes)
        if by_group is not None:
            product = call(aten.reshape.default, product, by_group)
        product = call(aten.mul.Tensor, product, scale)
        if by_group is not None:
            product = call(aten.reshape.default, product, [-1, *shape[1:]])
        return self.build.cast(product, dtype or value_of(weight).dtype)

    def _replay(self, steps: Iterable[Step], value: Operand) -> Operand:
        """What the steps make of ``value``."""
        for step in steps:
            if step.operand is None or (value == 0 and step.kind != "shift"):
                continue
            o = self._vector(step.operand)
            if step.kind == "shift":
                o = self._compute("scale", o, step.factor)
            value = self._compute(step.kind, value, o)
        return value

    def _compute(self, kind: str, a: Operand, b: Operand) -> Operand:
        """``a * b``, ``a / b`` or ``a + b``, as a step of this kind does; a number of numbers."""
        if isinstance(b, fx.Node) and not isinstance(a, fx.Node):
            if kind == "divide":
                kind, b = "scale", self.build.call(aten.reciprocal.default, b)
            a, b = b, a
        of_numbers, of_vectors, changes_nothing = _ARITHMETIC[kind]
        if not isinstance(a, fx.Node):
            return of_numbers(a, b)
        if b == changes_nothing:
            return a
        return 0.0 if (kind, b) == ("scale", 0) else self.build.call(of_vectors, a, b)

    def _vector(self, operand: Operand) -> Operand:
        """An operand as a vector in the wide dtype; a number stays a number."""
        if not isinstance(operand, fx.Node):
            return operand
        if value_of(operand).ndim != 1:
            operand = self.build.call(aten.reshape.default, operand, [value_of(operand).numel()])
        return self.build.cast(operand, self.dtype)

    def _full_vector(self, value: Operand) -> fx.Node:
        """``value`` with one element per channel."""
        channels = self.layer.out.shape[1]
        if not isinstance(value, fx.Node):
            like = {"dtype": self.dtype, "device": self.layer.out.device, "pin_memory": False}
            return self.build.call(aten.full.default, [channels], value, **like)
        if not layers.known_equal(value_of(value).shape[0], channels):
            return self.build.call(aten.expand.default, value, [channels])
        return value
