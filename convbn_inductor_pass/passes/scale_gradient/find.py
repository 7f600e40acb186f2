"""Find layers whose output backward sums over, weight gradients, and scalings.

Everything here reads a joint graph; nothing is judged or changed. :mod:`decide` has the algebra
and the names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from ..._torch import compat
from ...graph import layers
from ...graph.layers import Layer, Step, same_sizes, tensor_of

__all__ = [
    "Candidate",
    "Path",
    "Reduction",
    "WeightGradient",
    "arrangement",
    "depending_on",
    "find_candidates",
    "is_large",
    "is_move",
    "scalings_to",
    "users_of",
    "weight_gradients",
]

aten = torch.ops.aten

_SCALINGS = ("scale", "divide", "negate", "cast", "move")


@dataclasses.dataclass(frozen=True)
class Path:
    """How a node is computed from another one: per channel, which are its dimension ``dim``."""

    dim: int
    steps: tuple[Step, ...] = ()


@dataclasses.dataclass(frozen=True)
class Reduction:
    """``sum(h * u)`` over all but the channels, or with ``total`` over these, too.

    Attributes:
        node: the sum, which is replaced.
        product: ``h * u``.
        h: what depends on the gradient.
        affine: how ``u`` is computed from the layer's output.
        total: whether it is one number.
    """

    node: fx.Node
    product: fx.Node
    h: fx.Node
    affine: Path
    total: bool


@dataclasses.dataclass(frozen=True)
class WeightGradient:
    """A call that computes the gradient of a layer's weight from ``dc``, or could.

    ``node`` is ``convolution_backward``, or ``mm`` of ``dc`` and the layer's input where one of
    them is transposed; ``dc_first`` tells which: then the result is [C_out, C_in]. ``wanted`` is
    False where the layer is frozen and the weight gradient is not computed: then ``node`` is
    a ``convolution_backward`` for the input's gradient alone, or None, and ``dc`` the ``h`` of a
    sum.
    """

    node: fx.Node | None
    dc: fx.Node
    dc_first: bool = True
    wanted: bool = True


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A layer, what is computed of its output (see :func:`affine_values`), and sums over that."""

    layer: Layer
    values: dict[fx.Node, Path]
    reductions: tuple[Reduction, ...]


def depending_on(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """``nodes`` and all that is computed from them."""
    found, pending = set(nodes), list(nodes)
    while pending:
        new = [u for u in pending.pop().users if u not in found]
        found.update(new)
        pending += new
    return found


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
            if user in backward or user in found:
                continue
            steps = layers.read_step(user, node, found[node].dim)
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
            if len(h) != 1 or h[0] not in backward or not _same_shape(h[0], u):
                continue
            sums = _sums(product, [*range(len(_shape(u)))], path.dim, _shape(u))
            for node, total in sums or ():
                yield Reduction(node, product, h[0], path, total)  # type: ignore[arg-type]


def _shape(node: Any) -> tuple[Any, ...]:
    tensor = tensor_of(node)
    return () if tensor is None else tuple(tensor.shape)


def _same_shape(a: Any, b: Any) -> bool:
    return same_sizes(_shape(a), _shape(b))


def _sums(
    node: fx.Node, axes: list[int | None], dim: int, shape: tuple[Any, ...]
) -> list[tuple[fx.Node, bool]] | None:
    """The calls that end the summation of ``node``, each with whether the channels are summed.

    ``axes`` are the dimensions of ``shape`` that the dimensions of ``node`` are, None where they
    are summed. None if ``node`` is used for anything else.
    """
    found: list[tuple[fx.Node, bool]] = []
    for user in node.users:
        left = list(axes)
        if layers.is_cast(user):
            further = _sums(user, left, dim, shape)
        elif user.target is aten.sum.default:
            further = [(user, True)]
        elif user.target is aten.sum.dim_IntList:
            dims: Any = user.args[1] or range(len(left))
            keep = bool(user.args[2]) if len(user.args) > 2 else user.kwargs.get("keepdim", False)
            for d in dims:
                left[d] = None
            if not keep:
                summed = {d % len(axes) for d in dims}
                left = [a for i, a in enumerate(left) if i not in summed]
            open_axes = [a for a in left if a is not None and not _is_one(shape[a])]
            if set(open_axes) <= {dim}:
                further = [(user, dim not in left)]
            else:
                further = _sums(user, left, dim, shape)
        else:
            further = None
        if further is None:
            return None
        found += further
    return found


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def weight_gradients(
    candidate: Candidate, backward: set[fx.Node], *, frozen: bool
) -> Iterator[WeightGradient]:
    """Calls that compute the gradient of the layer's weight from some ``dc``, or could.

    Where a layer is ``frozen`` none does. It could still be computed, from what is summed over.
    """
    layer = candidate.layer
    found = False
    for gradient in (
        _conv_gradients(layer, backward) if layer.is_conv else _products(layer, backward)
    ):
        found = True
        yield gradient
    if frozen and not found:
        for reduction in candidate.reductions:
            if _same_shape(reduction.h, layer.node):
                yield WeightGradient(None, reduction.h, wanted=False)


def _conv_gradients(layer: Layer, backward: set[fx.Node]) -> Iterator[WeightGradient]:
    for user in layer.input.users:
        if user.target is aten.convolution_backward.default and user.args[1] is layer.input:
            args: Any = user.args
            same = args[2] is layer.weight and args[4:10] == layer.node.args[3:9]
            if same and args[0] in backward:
                yield WeightGradient(user, args[0], wanted=bool(args[10][1]))


def _products(layer: Layer, backward: set[fx.Node]) -> Iterator[WeightGradient]:
    for user in layer.input.users:
        if user.target is aten.mm.default and user.args[1] is layer.input:
            transposed: Any = user.args[0]
            if _is_transpose(transposed) and _is_dc(transposed.args[0], layer, backward):
                yield WeightGradient(user, transposed.args[0])
        if _is_transpose(user):
            for product in user.users:
                is_product = product.target is aten.mm.default and product.args[0] is user
                dc: Any = product.args[1]
                if is_product and _is_dc(dc, layer, backward):
                    yield WeightGradient(product, dc, dc_first=False)


def _is_transpose(node: Any) -> bool:
    return isinstance(node, fx.Node) and (
        node.target is aten.permute.default and node.args[1] in ([1, 0], (1, 0))
    )


def _is_dc(node: Any, layer: Layer, backward: set[fx.Node]) -> bool:
    return node in backward and _same_shape(node, layer.node)


def scalings_to(node: fx.Node, dim: int, backward: set[fx.Node]) -> dict[fx.Node, Path]:
    """The nodes that ``node`` is a scaling per channel of, itself first; channels in ``dim``.

    The steps of each path go from that node to ``node``; its ``dim`` is the channels in that node.
    """
    found = {node: Path(dim)}
    while True:
        sources = [n for n in node.all_input_nodes if n in backward and tensor_of(n) is not None]
        if len(sources) != 1:
            return found
        (source,) = sources
        steps = _scaling_step(node, source, dim)
        if steps is None:
            return found
        path = Path(steps[0], (*steps[1], *found[node].steps))
        found[source] = path
        node, dim = source, path.dim


def _scaling_step(node: fx.Node, of: fx.Node, dim: int) -> tuple[int, Sequence[Step]] | None:
    """The steps by which ``node`` scales ``of``, and where ``of`` has the channels."""
    rank = len(_shape(of))
    for before in (dim, *(d for d in range(rank) if d != dim)):  # mostly where it was
        steps = layers.read_step(node, of, before)
        if (
            before < rank
            and steps
            and steps[-1].dim == dim
            and all(s.kind in _SCALINGS for s in steps)
        ):
            return before, steps
    return None


def arrangement(*paths: Path) -> list[tuple[Any, ...]]:
    """The moves of one path after the other, in a form in which what undoes itself is gone.

    Equal forms move equal tensors in the same way. Each entry is a permutation of dimensions, or
    the shapes before and after a view.
    """
    moves: list[tuple[Any, ...]] = []
    for step in (s for path in paths for s in path.steps if s.kind == "move"):
        node = step.node
        before, after = _shape(node.args[0]), _shape(node)
        last = moves[-1][0] if moves else ""
        if node.target is aten.clone.default:
            continue
        if node.target is aten.permute.default:
            args: Any = node.args
            dims: list[int] = [d % len(before) for d in args[1]]
            if last == "permute":
                first = moves.pop()[1]
                dims = [first[d] for d in dims]
            if dims != sorted(dims):
                moves.append(("permute", dims))
        else:
            if last == "view":
                before = moves.pop()[1]
            if not same_sizes(before, after):
                moves.append(("view", before, after))
    return moves


def is_move(node: fx.Node) -> bool:
    """Whether ``node`` only holds the elements of its input in another place."""
    return compat.is_view(node.target) or node.target is aten.clone.default


def users_of(node: fx.Node) -> Iterator[fx.Node]:
    """Users of ``node`` and of its moves."""
    for user in node.users:
        if is_move(user):
            yield from users_of(user)
        else:
            yield user


def is_large(node: fx.Node, size: int) -> bool:
    """Whether ``node`` has at least ``size`` elements."""
    tensor = tensor_of(node)
    return tensor is not None and compat.size_hint(tensor.numel()) >= size
