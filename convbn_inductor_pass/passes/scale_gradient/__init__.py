"""Tune mode: gradients of per-channel scales from the weight gradient of the layer before them."""

from torch import fx

from ...config import get_options
from ..base import Outcome, Pass


class ScaleGradientPass(Pass):
    """Runs on the joint graph of forward and backward: see ``decide`` for the algebra."""

    name = "scale_gradient"
    hook = "joint_custom_pre_pass"
    also_counted = ("efficient_conv_bn_eval",)  # PyTorch's counter of this flag

    def run(self, graph: fx.Graph) -> Outcome:
        # Here, because registering must not load a compiler.
        from .decide import decide
        from .records import account
        from .rewrite import apply

        decisions = decide(graph, get_options())
        records = tuple(record for _, record in account(graph, decisions))
        return Outcome(apply(decisions, graph), records)
