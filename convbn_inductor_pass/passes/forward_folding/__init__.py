"""Forward folding: a layer, the affine map after it and its epilogue become one layer.

Before:  y = act(A * conv(x, W, b) + B)           or  y = relu(A * conv(x, W, b) + B + other)
After:   y = conv(x, A * W, A * b + B), with the activation or the addition in the same kernel

A and B, one value per channel, are recomputed each call from the live parameters, so that nothing
goes stale after an optimizer step, unlike with ``freezing=True``. On CPU the layer becomes oneDNN's
convolution, on NVIDIA's GPUs cuDNN's where a ReLU follows, elsewhere it stays the layer's own
operator. Outputs differ from eval mode's by rounding.

Declines where folding is not legal, and with ``forward="auto"`` where it moves more bytes: the
tables of :mod:`decide`. Phases: :mod:`find`, :mod:`decide`, :mod:`rewrite`.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from ...config import get_options
from ..base import Outcome, Pass

__all__ = ["ForwardFoldingPass"]


class ForwardFoldingPass(Pass):
    """Runs on the graph of the forward, or of inference; does nothing with ``forward="exact"``."""

    name = "forward_folding"
    hook = "post_grad_custom_pre_pass"  # before Inductor's own patterns fuse what is folded here

    def run(self, graph: fx.Graph) -> Outcome:
        options = get_options()
        if options.forward == "exact":
            return Outcome(0)
        # Here, because registering must not load a compiler.
        from .decide import Context, decide
        from .find import find_candidates
        from .records import make_records
        from .rewrite import rewrite

        context = Context.of(graph, options)
        decisions = [decide(c, context) for c in find_candidates(graph)]
        records = make_records(decisions)
        folded = [d.candidate for d in decisions if d.code.rewritten]
        if folded:
            rewrite(graph, folded)
        return Outcome(len(folded), records)

    def uuid(self) -> Any:
        """Decisions depend on settings of PyTorch's, too, that are in no cache key."""
        from ..._torch import inductor

        return f"{super().uuid()} {inductor.library_settings()}"
