"""Stores decisions with the compiled code, for :func:`records` after a cache hit.

Each pass attaches its records to the calls of its graph, whose metadata the partitioner copies.
"""

import json

from torch import fx

from .base import Outcome, Pass


class DecisionLogPass(Pass):
    """Runs on the graph of the forward, or of inference, after the others; changes nothing."""

    name = "decision_log"
    hook = "post_grad_custom_pre_pass"

    def run(self, graph: fx.Graph) -> Outcome:
        from .._torch import store
        from ..graph.uses import backward_of

        found = {id(made): made for node in graph.nodes for made in node.meta.get(self.KEY, ())}
        if found and not backward_of(graph):
            store.put(json.dumps([r.to_dict() for made in found.values() for r in made]))
        return Outcome(0)
