"""A tensor that backward might do without, and what the rules read of the joint graph."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import fx

from ..._torch import compat
from ...codes import Code
from ...config import get_options
from ...graph.builder import Builder
from ...graph.layers import is_cast
from ...graph.provenance import provenance_of
from ...graph.uses import backward_of, is_move, is_recomputed, reachable, users_of
from ...records import Kind, Record
from ..base import denied, record_of

aten = torch.ops.aten

# Operators that read the shape, and the layout, of their second argument, and no element of it.
READ_THE_SHAPE = (
    *(aten._adaptive_avg_pool2d_backward.default, aten._adaptive_avg_pool3d_backward.default),
    *(aten.adaptive_max_pool2d_backward.default, aten.adaptive_max_pool3d_backward.default),
    *(aten.avg_pool2d_backward.default, aten.avg_pool3d_backward.default),
    aten.max_pool2d_with_indices_backward.default,
    aten.max_pool3d_with_indices_backward.default,
    *(aten.reflection_pad1d_backward.default, aten.replication_pad1d_backward.default),
    *(aten.reflection_pad2d_backward.default, aten.replication_pad2d_backward.default),
    *(aten.reflection_pad3d_backward.default, aten.replication_pad3d_backward.default),
)


class Site(NamedTuple):
    """A decision about one tensor.

    ``kind`` is the rule; ``nbytes`` are not saved for backward if it is rewritten, by estimate;
    ``calls`` are what the rule rewrites.
    """

    kind: Kind
    node: fx.Node
    code: Code
    detail: str = ""
    nbytes: int = 0
    calls: tuple[fx.Node, ...] = ()


@dataclasses.dataclass(frozen=True)
class JointGraph:
    """A joint graph, with what the rules ask of it."""

    graph: fx.Graph

    @functools.cached_property
    def backward(self) -> set[fx.Node]:
        return backward_of(self.graph)

    @functools.cached_property
    def forward(self) -> set[fx.Node]:
        """What the outputs of the forward are computed from."""
        found: set[fx.Node] = set()
        for node in reversed(self.graph.nodes):
            if node.op == "output" or node in found:
                found.update(n for n in node.all_input_nodes if n not in self.backward)
        return found

    @functools.cached_property
    def shape_readers(self) -> set[fx.Node]:
        """Calls of the backward that read a tensor's shape alone: that of their second argument."""
        return {n for n in self.backward if n.target in READ_THE_SHAPE or _is_of_frozen_layer(n)}

    def reads(self, node: fx.Node, besides: Collection[fx.Node] = ()) -> bool:
        """Whether calls that the forward does not need take ``node``, a view or a cast of it.

        Masks, readers of its shape, and calls in ``besides`` do not count.
        """
        # Through those in the forward, too: it may be read after that.
        for user in users_of(node, lambda u: is_move(u) or is_cast(u)):
            if user in self.shape_readers or user in besides or user in self.forward:
                continue
            value = user.meta.get("val")
            is_mask = isinstance(value, torch.Tensor) and value.dtype == torch.bool
            is_size = isinstance(value, (int, torch.SymInt))
            if user.op == "call_function" and not (is_mask or is_size):
                return True
        return False

    def has(self, node: fx.Node, besides: Collection[fx.Node] = ()) -> bool:
        """Whether backward has the value anyway, or what it is computed from element by element.

        Then the partitioner can recompute what is pointwise of it, such as its mask.
        """

        def is_there(n: fx.Node) -> bool:
            return n.op != "call_function" or is_recomputed(n) or self.reads(n, besides)

        def is_computed(n: fx.Node) -> bool:
            return bool(n.all_input_nodes) and (is_move(n) or compat.is_pointwise(n.target))

        sources = reachable([node], lambda n: () if is_there(n) else n.all_input_nodes)
        return all(is_computed(n) or is_there(n) for n in sources)


def _is_of_frozen_layer(node: fx.Node) -> bool:
    args: Any = node.args
    return node.target is aten.convolution_backward.default and not args[10][1]


def unless_denied(site: Site) -> Site:
    """``site``, denied if the options leave out its modules, or masks."""
    options = get_options()
    by = denied(options, site.node, *site.calls)
    if by is None and site.kind == "mask" and not options.bit_masks:
        by = "bit_masks=False"
    return site if by is None else site._replace(code=Code.DENIED, detail=by)


def apply(
    sites: Iterable[Site], graph: fx.Graph, rewrite: Callable[[Builder, fx.Node, Site], None]
) -> int:
    """Rewrite the calls of all sites that were decided to be rewritten; returns how many sites.

    ``rewrite`` has a builder that puts new calls before the call that it is given.
    """
    wanted = [s for s in sites if s.code.rewritten]
    with Builder(graph) as build:
        for site in wanted:
            for call in site.calls:
                build.meta = provenance_of(call)
                with graph.inserting_before(call):
                    rewrite(build, call, site)
    return len(wanted)


def record(site: Site) -> Record:
    """The record of a decision, as users see it."""
    return record_of(
        site.node,
        pass_name="mask_bits" if site.kind == "mask" else "wanted_gradients",
        kind=site.kind,
        code=site.code,
        detail=site.detail,
        bytes_saved=site.nbytes if site.code.rewritten else 0,
    )
