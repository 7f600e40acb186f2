"""The passes, in the order in which Inductor calls them; none knows of another."""

from .base import Outcome, Pass
from .cpu_codegen import CpuCodegenPass
from .decision_log import DecisionLogPass
from .forward_folding import ForwardFoldingPass
from .scale_gradient import ScaleGradientPass

__all__ = ["PASSES", "Outcome", "Pass"]

PASSES: tuple[Pass, ...] = (
    ScaleGradientPass(),
    ForwardFoldingPass(),
    CpuCodegenPass(),
    DecisionLogPass(),
)
