"""Recognise parallel branches whose sum is one convolution, and compute its weight.

    y = a1 * conv3x3(x, W1) + b1  +  a2 * conv1x1(x, W2) + b2
      = conv3x3(x, a1 * W1 + pad(a2 * W2),  b1 + b2)

Blocks of RepVGG, MobileOne and the like train in the first form and are deployed in the second,
with weights that are merged once and for all. Here they are merged from the live parameters: worth
it where the result can be kept (:mod:`kept`), which is what ``forward`` asks for.

A batch norm of the input itself, which deployment merges, too, stays a term of the sum. Inside the
convolution it would be a large number among many small ones, all of whose roundings it coarsens:
errors against float64 were 2 to 3 times eval mode's with it, and 1.0 to 1.4 times without.

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
        others: the other terms, shaped like the sum.
        last: the node of the sum.
    """

    chains: tuple[AffineChain, ...]
    others: tuple[fx.Node, ...]
    last: fx.Node


def find_branches(graph: fx.Graph, chains: Iterable[AffineChain]) -> Iterator[Branches]:
    """Sums with terms from ``chains`` that one convolution can compute, one for each sum.

    These terms are used by the sum alone. Their shapes are known, not symbolic.
    """
    by_last = {c.last: c for c in chains if len(c.last.users) == 1 and _may_be_one(c)}
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        if _is_sum(node) and not any(_is_sum(u) for u in node.users if len(node.users) == 1):
            found = _widest(node, list(_terms(node)), by_last)
            if found is not None:
                yield found


def _may_be_one(chain: AffineChain) -> bool:
    layer = chain.layer
    geometry = [n for numbers in layer.node.args[3:6] for n in numbers] if layer.is_conv else []  # type: ignore[union-attr]
    return (
        layer.is_conv
        and not layer.layout.transposed
        and all(s.kind != "move" for s in chain.steps)
        and all(isinstance(n, int) for n in (*layer.out.shape, *_kernel(layer), *geometry))
    )


def _is_sum(node: fx.Node) -> bool:
    """Whether ``node`` adds two tensors of its own shape and dtype."""
    result = tensor_of(node)
    if node.target is not aten.add.Tensor or node.kwargs or result is None:
        return False
    terms = [tensor_of(n) for n in node.args]
    return all(
        t is not None and t.dtype == result.dtype and aten_ir.same_sizes(t.shape, result.shape)
        for t in terms
    )


def _terms(node: fx.Node) -> Iterator[fx.Node]:
    """What is added in ``node``, and in the sums that nothing else uses."""
    for term in node.args:
        if isinstance(term, fx.Node) and _is_sum(term) and len(term.users) == 1:
            # Twice the same sum is one user, but two terms.
            yield from _terms(term)
        elif isinstance(term, fx.Node):
            yield term


def _widest(
    node: fx.Node, terms: list[fx.Node], by_last: Mapping[fx.Node, AffineChain]
) -> Branches | None:
    """The most branches in a sum that one of its convolutions covers; None if there are not two."""
    chains = [by_last[t] for t in terms if t in by_last and terms.count(t) == 1]
    best: list[AffineChain] = []
    for wide in chains:
        covered = [c for c in chains if c is not wide and _margins(wide.layer, c.layer) is not None]
        if len(covered) >= max(len(best), 1):
            best = [wide, *covered]
    merged = {c.last for c in best}
    return Branches(tuple(best), tuple(t for t in terms if t not in merged), node) if best else None


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
    if narrow.input is not wide.input or narrow.layout != wide.layout:
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


def emit_weight_and_bias(branches: Branches, build: Builder) -> tuple[fx.Node, fx.Node | None]:
    """Nodes of the convolutions' common weight, shaped like the first one's, and bias [C_out].

    Computed in float32 (float64 where the layers are) and rounded once, to the layers' dtype. The
    first input of all that the weight is computed from is the first convolution's weight.
    """
    wide = branches.chains[0].layer
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
