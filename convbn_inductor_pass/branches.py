"""Recognise parallel branches whose sum is one convolution, and compute its weight.

    y = a1 * conv3x3(x, W1) + b1  +  a2 * conv1x1(x, W2) + b2
      = conv3x3(x, a1 * W1 + pad(a2 * W2),  b1 + b2)

Blocks of RepVGG, MobileOne and the like train in the first form and are deployed in the second,
with weights that are merged once and for all. Here they are merged from the live parameters: worth
it where the result can be kept (:mod:`kept`), which is what ``forward`` asks for.

A batch norm of the input itself, which deployment merges, too, stays a term of the sum. Inside the
convolution it would be a large number among many small ones, all of whose roundings it coarsens. A
1x1 convolution whose diagonal is as large does the same.

Source: Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021 (arXiv 2101.03697),
section 3.3.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import fx

from . import affine, aten_ir
from .affine import AffineChain
from .aten_ir import Layer, tensor_of
from .build import Builder

__all__ = ["Branches", "emit_weight_and_bias", "find_branches"]

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Branches:
    """A sum of affine chains after convolutions of the same input, and of other terms.

    Attributes:
        chains: two or more. The kernel of the first one's layer covers the others'.
        others: the other terms.
        last: the node of the sum. All terms have its shape and dtype, and the layers' outputs, too.
    """

    chains: tuple[AffineChain, ...]
    others: tuple[fx.Node, ...]
    last: fx.Node

    @property
    def wide(self) -> Layer:
        """The layer with the kernel that covers all."""
        return self.chains[0].layer


def find_branches(graph: fx.Graph, chains: Iterable[AffineChain]) -> Iterator[Branches]:
    """Sums with terms from ``chains`` that one convolution can compute: in each sum the most.

    These terms are used by the sum alone. Their shapes are known, not symbolic.
    """
    by_last = {c.last: c for c in chains if len(c.last.users) == 1 and _may_be_one(c)}
    if len(by_last) < 2:
        return
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        if _is_sum(node) and not any(_is_sum(u) for u in node.users if len(node.users) == 1):
            found = _largest_group(node, _terms(node), by_last)
            if found is not None:
                yield found


def _may_be_one(chain: AffineChain) -> bool:
    layer, result = chain.layer, tensor_of(chain.last)
    geometry = [n for numbers in layer.node.args[3:6] for n in numbers] if layer.is_conv else []  # type: ignore[union-attr]
    return (
        layer.is_conv
        and not layer.layout.transposed
        and result is not None
        and result.dtype == layer.out.dtype
        and all(s.kind != "move" for s in chain.steps)
        and all(isinstance(n, int) for n in (*layer.out.shape, *_kernel(layer), *geometry))
    )


def _is_sum(node: fx.Node) -> bool:
    """Whether ``node`` adds two other tensors of its own shape and dtype."""
    result = tensor_of(node)
    if node.target is not aten.add.Tensor or node.kwargs or result is None:
        return False
    terms = [tensor_of(n) for n in node.args]
    return node.args[0] is not node.args[1] and all(
        t is not None and t.dtype == result.dtype and aten_ir.same_sizes(t.shape, result.shape)
        for t in terms
    )


def _terms(node: fx.Node) -> list[fx.Node]:
    """What is added in ``node``, and in the sums that nothing else uses, from left to right."""
    terms, pending = [], [node]
    while pending:
        term = pending.pop()
        if term is node or (_is_sum(term) and len(term.users) == 1):
            pending += reversed(term.args)  # type: ignore[arg-type]
        else:
            terms.append(term)
    return terms


def _largest_group(
    node: fx.Node, terms: list[fx.Node], by_last: Mapping[fx.Node, AffineChain]
) -> Branches | None:
    """The most terms of a sum that one of them covers; None if there are not two."""
    chains = [by_last[term] for term in terms if term in by_last]
    groups = [
        (wide, *(c for c in chains if c is not wide and _margins(wide.layer, c.layer) is not None))
        for wide in chains
    ]
    group = max(groups, key=len, default=())
    if len(group) < 2:
        return None
    merged = {chain.last for chain in group}
    return Branches(group, tuple(t for t in terms if t not in merged), node)


def _kernel(layer: Layer) -> torch.Size:
    weight = tensor_of(layer.weight)
    if weight is None:
        raise AssertionError(f"{layer.node} has no metadata")
    return weight.shape[2:]


def _margins(wide: Layer, narrow: Layer) -> list[tuple[int, int]] | None:
    """How many zeros before and after make a narrow kernel read what it reads as a wide one.

    By dimension; None where zeros cannot do it.
    """
    stride, padding, dilation = wide.node.args[3:6]
    if not _same_value(narrow.input, wide.input) or narrow.layout != wide.layout:
        return None
    if narrow.node.args[3] != stride or narrow.out.dtype != wide.out.dtype:
        return None
    sizes = zip(_kernel(wide), _kernel(narrow), strict=True)
    paddings = zip(padding, narrow.node.args[4], strict=True)  # type: ignore[arg-type]
    dilations = zip(dilation, narrow.node.args[5], strict=True)  # type: ignore[arg-type]
    margins = []
    for (size, inner), (p, q), (step, d) in zip(sizes, paddings, dilations, strict=True):
        before, rest = divmod(p - q, step)
        after = size - inner - before
        if rest or before < 0 or after < 0 or not (inner == 1 or d == step):
            return None
        margins.append((before, after))
    return margins


def _same_value(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes are one, or casts of one: autocast casts anew for each layer."""
    calls = [(n.target, n.args, n.kwargs) for n in (a, b)]
    return a is b or (aten_ir.is_cast(a) and calls[0] == calls[1])


def emit_weight_and_bias(branches: Branches, build: Builder) -> tuple[fx.Node, fx.Node | None]:
    """Nodes of the convolutions' common weight, shaped like the first one's, and bias [C_out].

    Computed in float32 (float64 where the layers are) and rounded once, to the layers' dtype. The
    first input of all that the weight is computed from is the first convolution's weight.
    """
    wide = branches.wide
    weights, shifts = [], []
    for chain in branches.chains:
        scale, shift = affine.emit_scale_and_shift(chain, build)
        weight = affine.emit_scaled_weight(chain.layer, scale, build)
        weights.append(_padded(weight, _margins(wide, chain.layer), build))
        shifts += [] if shift is None else [shift]
    add = functools.partial(build.call, aten.add.Tensor)
    bias = functools.reduce(add, shifts) if shifts else None
    dtype = wide.out.dtype
    return build.cast(functools.reduce(add, weights), dtype), bias and build.cast(bias, dtype)


def _padded(weight: fx.Node, margins: Sequence[tuple[int, int]] | None, build: Builder) -> fx.Node:
    if margins is None:
        raise AssertionError(f"{weight} does not fit the widest kernel")
    if not any(map(any, margins)):
        return weight
    pad = [n for before_after in reversed(margins) for n in before_after]
    return build.call(aten.constant_pad_nd.default, weight, pad)
