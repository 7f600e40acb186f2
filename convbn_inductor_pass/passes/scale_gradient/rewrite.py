"""Rewrite the joint graph as :mod:`decide` has decided; the algebra is there.

In float16, ``dWg`` may leave the range although eval mode's ``dW`` does not. So ``g`` is multiplied
with a power of two per channel, t, and S divided by it: ``dW = S / t * dWg'``, and ``sum(g * c) =
<dWg', W> / t + b * sum(g)``. ``functional.gradients.gradient_scale`` says how t is chosen.
"""

import operator
from typing import Any

import torch
from torch import fx

from ...graph.affine import Emitter
from ...graph.builder import Builder
from ...graph.layers import Layer, is_cast, same_sizes, tensor_of, value_of
from ...graph.layout import Layout
from ...graph.provenance import provenance_of
from .decide import Decision
from .find import Match

aten = torch.ops.aten


def apply(decisions: list[Decision], graph: fx.Graph) -> int:
    """Rewrite the graph as decided; returns the number of layers whose output is not summed over.

    New calls are inserted before what they replace, and the graph is sorted at the end. No cycle
    can arise: each replaced call depends on a ``g``, and nothing else that is read depends on a
    gradient.
    """
    wanted = [(_first_replaced(d.match), d.candidate.layer, d.match) for d in decisions if d.match]
    with Builder(graph) as build:
        for place, layer, match in sorted(wanted, key=lambda w: w[0]):
            build.meta = provenance_of(match.gradient.node or place)
            with graph.inserting_before(place):
                _Rewriting(layer, match, build).replace()
    return len(wanted)


def _first_replaced(match: Match) -> fx.Node:
    gradient = match.gradient.node
    return min([r.node for r in match.reductions] + ([gradient] if gradient else []))


class _Rewriting:
    """The new calls for one match."""

    def __init__(self, layer: Layer, match: Match, build: Builder) -> None:
        self.match, self.build, self._call = match, build, build.call
        self.layer, self.gradient, self.g = layer, match.gradient, match.g
        self.emit = Emitter(build, layer)
        self.wide, self._scaled = self.emit.dtype, self.emit.scaled
        self.dims = [d for d in range(value_of(self.g).ndim) if d != match.scaling.dim]
        self.scale = self.emit.scale(match.scaling.steps)
        self.power: fx.Node | None = None  # t
        self.on_weight = self.scale  # S / t
        if value_of(self.gradient.dc).dtype == torch.float16:
            self.power = self._power_of_two()
            inverse = self._call(aten.reciprocal.default, self.power)
            self.on_weight = self._times(inverse, self.scale)

    def replace(self) -> None:
        """Put the new calls in the place of the old ones."""
        compute = self._convolution if self.layer.is_conv else self._matmul
        inner = self._inner_product(compute())
        if self.power is not None:
            inner = self._call(aten.div.Tensor, inner, self.power)
        for reduction, path in zip(self.match.reductions, self.match.scalings, strict=True):
            value = self._times(inner, self.emit.scale(reduction.affine.steps))
            shift = self.emit.shift(reduction.affine.steps)
            if shift is not None:
                value = self._call(aten.add.Tensor, value, self._times(self._sum_g(), shift))
            value = self._times(value, self.emit.scale(path.steps))
            if reduction.total:
                value = self._call(aten.sum.dim_IntList, value, [0], False)
            self._replace(reduction.node, value)

    def _sum_g(self) -> fx.Node:
        """The sum of ``g`` [C]: an existing one if there is one, as for a batch norm's shift.

        Nothing merges the two later: PyTorch does not deduplicate what the graph returns.
        """
        g = self.build.current(self.g)
        # PyTorch recreates returned meta tensors at the end of the graph, for all their users.
        is_meta = value_of(g).device.type == "meta"
        for wide in () if is_meta else (g, *(u for u in g.users if is_cast(u))):
            for user in wide.users if value_of(wide).dtype == self.wide else ():
                is_sum = user.target is aten.sum.dim_IntList and not user.kwargs
                if is_sum and list(user.args[1:]) in ([self.dims], [self.dims, False]):
                    return user
        if value_of(g).dtype == self.wide:
            return self._call(aten.sum.dim_IntList, g, self.dims)
        return self._call(aten.sum.dim_IntList, g, self.dims, False, dtype=self.wide)

    def _power_of_two(self) -> fx.Node:
        """t [C], log2(t) = clamp(max(-2 - ceil(log2(norm(g))), ceil(log2(abs(S))) - 8), -24, 15)"""
        g = self.build.cast(self.g, self.wide)
        squares = self._call(aten.sum.dim_IntList, self._call(aten.mul.Tensor, g, g), self.dims)
        exponent = self._ceil_log2(self._call(aten.sqrt.default, squares))
        exponent = self._call(aten.add.Tensor, self._call(aten.neg.default, exponent), -2)
        if self.scale is not None:
            of_scale = self._ceil_log2(self._call(aten.abs.default, self.scale))
            least = self._call(aten.add.Tensor, of_scale, -8)
            exponent = self._call(aten.maximum.default, exponent, least)
        exponent = self._call(aten.clamp_min.default, exponent, -24.0)
        return self._call(aten.exp2.default, self._call(aten.clamp_max.default, exponent, 15.0))

    def _ceil_log2(self, value: fx.Node) -> fx.Node:
        return self._call(aten.ceil.default, self._call(aten.log2.default, value))

    def _convolution(self) -> fx.Node:
        """Replace the results of ``convolution_backward``; returns the gradient for ``g``."""
        node, x, weight = self.gradient.node, self.layer.input, self.layer.weight
        mask: Any = [False, False, False] if node is None else node.args[10]
        if mask[0]:
            weight = self._scaled(weight, self.on_weight, self.layer.layout)
        new = self._call(
            aten.convolution_backward.default,
            *(self._arranged_g(), x, weight, None),
            *(*self.layer.node.args[3:9], [mask[0], True, False]),
        )
        dw = self._call(operator.getitem, new, 1)
        for user in [] if node is None else list(node.users):
            index = user.args[1]
            if index == 0 and mask[0]:
                self._replace(user, self._call(operator.getitem, new, 0))
            elif index == 1 and mask[1]:
                self._replace(user, self._scaled(dw, self.on_weight, self.layer.layout))
            elif index == 2 and mask[2]:
                self._replace(user, self._times(self._sum_g(), self.scale))
        return dw

    def _matmul(self) -> fx.Node:
        """Replace products with ``dc``; returns the weight gradient [C_out, C_in] for ``g``."""
        g, x = self._arranged_g(), self.layer.input
        transposed = self._call(aten.permute.default, g, [1, 0])
        dw = self._call(aten.mm.default, transposed, x)
        if self.gradient.node is None:
            return dw
        scaled = self._scaled(dw, self.on_weight, Layout())
        if not self.gradient.dc_first:
            scaled = self._call(aten.permute.default, scaled, [1, 0])
        self._replace(self.gradient.node, scaled)
        size = value_of(self.layer.weight).shape
        for user in list(self.gradient.dc.users):
            # It may have been replaced for another layer with this ``dc``.
            is_product = user.target is aten.mm.default and user.args[0] is self.gradient.dc
            if is_product and user not in self.build.replaced:
                by: Any = user.args[1]
                if same_sizes(value_of(by).shape, (size[1], size[0])):
                    by = self._scaled(by, self.on_weight, Layout())
                    self._replace(user, self._call(aten.mm.default, g, by))
        return dw

    def _arranged_g(self) -> fx.Node:
        """``g``, times t in float16, with its elements where ``dc`` has them, and in its dtype."""
        node = self.build.current(self.g)
        if self.power is not None:
            sizes = [1] * value_of(node).ndim
            sizes[self.match.scaling.dim] = -1
            power = self._call(aten.reshape.default, self.power, sizes)
            node = self._call(aten.mul.Tensor, self.build.cast(node, self.wide), power)
        dtype = value_of(self.gradient.dc).dtype
        source = tensor_of(node.all_input_nodes[0]) if is_cast(node) else None
        if source is not None and source.dtype == dtype and dtype.itemsize < self.wide.itemsize:
            node = self.build.current(node.all_input_nodes[0])  # what it was widened from
        node = self.build.cast(node, dtype)
        for step in self.match.scaling.steps:
            if step.kind == "move":
                target, args = step.node.target, step.node.args[1:]
                if target in (aten.view.default, aten._unsafe_view.default):
                    # The product may lie in memory in another way than ``g`` does.
                    node = self.build.dense(node)
                node = self._call(target, node, *args, **step.node.kwargs)
        return node

    def _inner_product(self, weight_gradient: fx.Node) -> fx.Node:
        """``<dWg, W>`` per output channel [C], in the wide dtype."""
        weight, layout = self.layer.weight, self.layer.layout
        if not self.layer.is_conv:
            weight, layout = self._call(aten.permute.default, weight, [1, 0]), Layout()
        a, b = (self.build.cast(n, self.wide) for n in (weight_gradient, weight))
        product = self._call(aten.mul.Tensor, a, b)
        shape = value_of(product).shape
        if not layout.transposed:
            return self._call(aten.sum.dim_IntList, product, [*range(1, len(shape))], False)
        sizes = [layout.groups, -1, *shape[1:]]
        by_group = self._call(aten.reshape.default, product, sizes)
        inner = self._call(aten.sum.dim_IntList, by_group, [1, *range(3, len(sizes))], False)
        return self._call(aten.reshape.default, inner, [-1])

    def _times(self, value: fx.Node, scale: fx.Node | None) -> fx.Node:
        return value if scale is None else self._call(aten.mul.Tensor, value, scale)

    def _replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let ``new`` be used for ``old``, in its shape and dtype."""
        tensor = value_of(old)
        if not same_sizes(value_of(new).shape, tensor.shape):
            new = self._call(aten.reshape.default, new, list(tensor.shape))
        self.build.replace(old, self.build.cast(new, tensor.dtype))
