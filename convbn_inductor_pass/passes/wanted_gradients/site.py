"""A tensor that backward might do without, and what the rules read of the joint graph."""

import dataclasses
import functools
from collections.abc import Callable, Iterable

from torch import fx

from ...codes import Code
from ...config import Options
from ...graph.builder import Builder
from ...graph.provenance import provenance_of
from ...graph.uses import backward_of
from ...records import Kind, Record
from ..decisions import denied, record_of


@dataclasses.dataclass(frozen=True)
class Site:
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


def unless_denied(site: Site, options: Options) -> Site:
    """``site``, denied if the options leave out its modules."""
    paths = denied(options, site.node, *site.calls)
    return site if paths is None else dataclasses.replace(site, code=Code.DENIED, detail=paths)


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
