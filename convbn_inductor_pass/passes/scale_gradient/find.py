"""Find layers whose output backward sums over, and the calls that make their weight gradients.

The sums and such a call begin with one ``g``, scaled per channel and moved. Only reads a joint
graph. :mod:`decide` has the algebra and says what the names mean.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from ...graph import layers
from ...graph.layers import Layer, Step, same_shape, same_sizes, tensor_of, value_of

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
            open_axes = [a for a in left if a is not None and not layers.known_equal(shape[a], 1)]
            if set(open_axes) <= {dim}:
                further = [(user, dim not in left)]
            else:
                further = _sums(user, left, dim, shape)
        if further is None:
            return None
        found += further
    return found


class WeightGradient(NamedTuple):
    """A call that computes the gradient of a layer's weight from ``dc``, or could.

    ``node`` is ``convolution_backward``, or ``mm`` of ``dc`` and the layer's input; ``dc_first``
    where the result is [C_out, C_in]. Not ``wanted`` where the layer is frozen: then ``node`` is
    for the input's gradient alone; or it is None, and ``dc`` the ``h`` of a sum.
    """

    node: fx.Node | None
    dc: fx.Node
    dc_first: bool = True
    wanted: bool = True


class Match(NamedTuple):
    """Sums over a layer's output that can be taken from one call that makes its weight gradient.

    ``dc`` and the ``h`` of each sum are scalings of ``g``: by ``scaling`` and ``scalings``.
    """

    gradient: WeightGradient
    g: fx.Node
    scaling: Path
    reductions: tuple[Reduction, ...]
    scalings: tuple[Path, ...]

    @property
    def steps(self) -> list[Step]:
        paths = (self.scaling, *self.scalings, *(r.affine for r in self.reductions))
        return [step for path in paths for step in path.steps]


def weight_gradients(
    candidate: Candidate, backward: set[fx.Node], *, frozen: bool
) -> list[WeightGradient]:
    """Calls that compute the gradient of the layer's weight from some ``dc``, or could.

    Where a layer is ``frozen`` none does. It could still be computed, from what is summed over.
    """
    layer = candidate.layer
    found = [*(_conv_gradients if layer.is_conv else _products)(layer, backward)]
    if frozen and not found:
        of_sums = (r.h for r in candidate.reductions if same_shape(r.h, layer.node))
        found = [WeightGradient(None, h, wanted=False) for h in of_sums]
    return found


def _conv_gradients(layer: Layer, backward: set[fx.Node]) -> Iterator[WeightGradient]:
    for user in layer.input.users:
        if user.target is aten.convolution_backward.default and user.args[1] is layer.input:
            args: Any = user.args
            same = args[2] is layer.weight and args[4:10] == layer.node.args[3:9]
            if same and args[0] in backward:
                yield WeightGradient(user, args[0], wanted=bool(args[10][1]))


def _products(layer: Layer, backward: set[fx.Node]) -> Iterator[WeightGradient]:
    def is_dc(node: Any) -> bool:
        return node in backward and same_shape(node, layer.node)

    for user in layer.input.users:
        if user.target is aten.mm.default and user.args[1] is layer.input:
            transposed: Any = user.args[0]
            if _is_transpose(transposed) and is_dc(transposed.args[0]):
                yield WeightGradient(user, transposed.args[0])
        for product in user.users if _is_transpose(user) else ():
            dc: Any = product.args[1]
            if product.target is aten.mm.default and product.args[0] is user and is_dc(dc):
                yield WeightGradient(product, dc, dc_first=False)


def _is_transpose(node: fx.Node) -> bool:
    return node.target is aten.permute.default and node.args[1] in ([1, 0], (1, 0))


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
        # Where the source's channels are: mostly where they were.
        dims = sorted(range(value_of(source).ndim), key=lambda d: d != dim)
        read = ((d, layers.read_step(node, source, d)) for d in dims)
        fitting = ((d, steps) for d, steps in read if steps and _is_scaling(steps, dim))
        before, steps = next(fitting, (0, None))
        if steps is None:
            return found
        found[source] = Path(before, (*steps, *found[node].steps))
        node, dim = source, before


def _is_scaling(steps: Sequence[Step], dim: int) -> bool:
    return steps[-1].dim == dim and all(s.kind != "shift" for s in steps)


def arrangement(*paths: Path) -> list[tuple[Any, ...]]:
    """The moves of one path after the other, less what undoes itself: equal ones move alike.

    Each entry is a permutation of dimensions, or the shapes before and after a view.
    """
    moves: list[tuple[Any, ...]] = []
    for step in (s for path in paths for s in path.steps if s.kind == "move"):
        node = step.node
        before, after = value_of(node.args[0]).shape, value_of(node).shape
        last = moves[-1][0] if moves else ""
        if node.target is aten.permute.default:
            args: Any = node.args
            dims: list[int] = [d % len(before) for d in args[1]]
            if last == "permute":
                first = moves.pop()[1]
                dims = [first[d] for d in dims]
            if dims != sorted(dims):
                moves.append(("permute", dims))
        elif node.target is not aten.clone.default:
            if last == "view":
                before = moves.pop()[1]
            if not same_sizes(before, after):
                moves.append(("view", before, after))
    return moves


def match_sums(
    candidate: Candidate, gradient: WeightGradient, backward: set[fx.Node]
) -> Match | None:
    """The sums over scalings of what ``gradient.dc`` is a scaling of; None if there is none."""
    to_dc = scalings_to(gradient.dc, candidate.layer.dim, backward)
    matched: list[tuple[Reduction, dict[fx.Node, Path]]] = []
    for r in candidate.reductions:
        common = {
            n: path
            for n, path in scalings_to(r.h, r.affine.dim, backward).items()
            if n in to_dc
            and path.dim == to_dc[n].dim
            and arrangement(to_dc[n], r.affine) == arrangement(path)
        }
        if common:
            matched.append((r, common))
    for g, scaling in to_dc.items():  # from dc up
        if matched and all(g in common for _, common in matched):
            sums = tuple(r for r, _ in matched)
            scalings = tuple(common[g] for _, common in matched)
            return Match(gradient, g, scaling, sums, scalings)
    return None
