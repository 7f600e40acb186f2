"""Tune mode: gradients of per-channel scales from the weight gradient of the layer before them."""

from __future__ import annotations

from torch import fx

from ..base import Outcome, Pass

__all__ = ["ScaleGradientPass"]


class ScaleGradientPass(Pass):
    """Runs on the joint graph of forward and backward: see ``decide`` for the algebra."""

    name = "scale_gradient"
    hook = "joint_custom_pre_pass"

    def run(self, graph: fx.Graph) -> Outcome:
        # Here, because registering must not load a compiler.
        from ...config import get_options
        from . import records, rewrite
        from .decide import decide

        decisions = decide(graph, get_options())
        made = records.make_records(graph, decisions)
        return Outcome(rewrite.apply(decisions, graph), made)
