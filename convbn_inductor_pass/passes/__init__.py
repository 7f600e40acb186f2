"""The passes, in the order in which Inductor calls them; they are independent of each other."""

from .base import DecisionLogPass, Pass
from .batched_weights import BatchedWeightsPass
from .forward_folding import ForwardFoldingPass
from .repeated_casts import RepeatedCastsPass
from .scale_gradient import ScaleGradientPass
from .wanted_gradients import MaskBitsPass, WantedGradientsPass

PASSES: tuple[Pass, ...] = (
    ScaleGradientPass(),
    WantedGradientsPass(),
    MaskBitsPass(),
    ForwardFoldingPass(),
    BatchedWeightsPass(),
    RepeatedCastsPass(),
    DecisionLogPass(),
)
