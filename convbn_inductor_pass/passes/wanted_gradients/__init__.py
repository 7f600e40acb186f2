"""Save for backward only what the wanted gradients need: fewer bytes than a merged model saves.

Each rule is a file. :mod:`pooling`, :mod:`activations` and :mod:`shapes` read the joint graph,
before it is partitioned. :mod:`bits` sees what the partitioner has decided to save.
"""

from torch import fx

from ...records import Record
from ..base import Outcome, Pass


class WantedGradientsPass(Pass):
    """Runs on the joint graph, after tune mode has made weight gradients of sums."""

    name = "wanted_gradients"
    hook = "joint_custom_pre_pass"

    def run(self, graph: fx.Graph) -> Outcome:
        # Here, because registering must not load a compiler.
        from . import activations, pooling, shapes
        from .site import JointGraph, apply, record, unless_denied

        records: list[Record] = []
        rewritten = 0
        # One after the other: what one rule leaves unsaved, the next does not count as saved.
        for rule in (pooling, activations, shapes):
            sites = [*map(unless_denied, rule.find_sites(JointGraph(graph)))]
            records += map(record, sites)
            rewritten += apply(sites, graph, rule.rewrite)
        return Outcome(rewritten, tuple(records))


class MaskBitsPass(Pass):
    """Runs on the forward and the backward that the partitioner has made."""

    name = "mask_bits"
    hook = "custom_partitioner_fn"

    def run(self, graph: fx.Graph, backward: fx.Graph) -> Outcome:
        from .bits import find_masks, pack
        from .site import record, unless_denied

        sites = [*map(unless_denied, find_masks(graph, backward))]
        return Outcome(pack(sites, graph, backward), tuple(map(record, sites)))
