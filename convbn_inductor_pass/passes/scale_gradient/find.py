"""Find layers whose output backward sums over.

Only reads a joint graph. :mod:`decide` has the algebra and the names.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from ...graph import layers
from ...graph.layers import Layer, Step, known_equal, same_shape, value_of

aten = torch.ops.aten


class Path(NamedTuple):
    """How a node is computed from another one: per channel, which are its dimension ``dim``."""

    dim: int
    steps: tuple[Step, ...] = ()


class Reduction(NamedTuple):
    """``sum(h * u)`` over all but the channels, or with ``total`` over these, too.

    ``node`` is the sum, ``product`` what it sums; ``affine`` says how ``u`` is computed from the
    layer's output, and ``h`` depends on the gradient.
    """

    node: fx.Node
    product: fx.Node
    h: fx.Node
    affine: Path
    total: bool


class Candidate(NamedTuple):
    """A layer, what is computed of its output (see :func:`affine_values`), and sums over that."""

    layer: Layer
    values: dict[fx.Node, Path]
    reductions: tuple[Reduction, ...]


def find_candidates(graph: fx.Graph, backward: set[fx.Node]) -> Iterator[Candidate]:
    """Layers of the forward whose output ``backward`` sums over, in order."""
    for node in graph.nodes:
        layer = None if node in backward else layers.layer_of(node)
        if layer is not None:
            values = affine_values(layer, backward)
            reductions = tuple(reductions_of(values, backward))
            if reductions:
                yield Candidate(layer, values, reductions)


def affine_values(layer: Layer, backward: set[fx.Node]) -> dict[fx.Node, Path]:
    """What is computed from the layer's output alone, affine per channel, without gradients."""
    found = {layer.node: Path(layer.dim)}
    pending = [layer.node]
    while pending:
        node = pending.pop()
        for user in node.users:
            is_new = user not in backward and user not in found
            steps = layers.read_step(user, node, found[node].dim) if is_new else None
            if steps:
                found[user] = Path(steps[-1].dim, (*found[node].steps, *steps))
                pending.append(user)
    return found


def reductions_of(values: dict[fx.Node, Path], backward: set[fx.Node]) -> Iterator[Reduction]:
    """Sums over all but channels (or all) of products of one of ``values`` and a gradient."""
    for u, path in values.items():
        for product in u.users:
            if product not in backward or product.target is not aten.mul.Tensor:
                continue
            h = [n for n in product.args if n is not u]
            if len(h) != 1 or h[0] not in backward or not same_shape(h[0], u):
                continue
            shape = value_of(u).shape
            sums = _sums(product, [*range(len(shape))], path.dim, shape)
            for node, total in sums or ():
                yield Reduction(node, product, h[0], path, total)  # type: ignore[arg-type]


def _sums(
    node: fx.Node, axes: list[int | None], dim: int, shape: torch.Size
) -> list[tuple[fx.Node, bool]] | None:
    """The calls that end the summation of ``node``, each with whether the channels are summed.

    ``axes`` are the dimensions of ``shape`` that the dimensions of ``node`` are, None where they
    are summed. None if ``node`` is used for anything else.
    """
    found: list[tuple[fx.Node, bool]] = []
    for user in node.users:
        further = None
        if layers.is_cast(user):
            further = _sums(user, axes, dim, shape)
        elif user.target is aten.sum.default:
            further = [(user, True)]
        elif user.target is aten.sum.dim_IntList:
            dims: Any = user.args[1] or range(len(axes))
            gone = {d % len(axes) for d in dims}
            keep = user.args[2] if len(user.args) > 2 else user.kwargs.get("keepdim", False)
            left = [None if i in gone else a for i, a in enumerate(axes) if keep or i not in gone]
            open_axes = [a for a in left if a is not None and not known_equal(shape[a], 1)]
            if set(open_axes) <= {dim}:
                further = [(user, dim not in left)]
            else:
                further = _sums(user, left, dim, shape)
        if further is None:
            return None
        found += further
    return found
