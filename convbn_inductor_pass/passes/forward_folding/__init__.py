"""Forward folding: a layer, the affine map after it and its epilogue become one layer.

Before:  y = act(A * conv(x, W, b) + B)           or  y = relu(A * conv(x, W, b) + B + other)
After:   y = conv(x, A * W, A * b + B), with the activation or the addition in the same kernel

A and B, [C], are recomputed each call from the live parameters. On CPU a convolution becomes
oneDNN's, on NVIDIA's GPUs cuDNN's where a ReLU follows. :mod:`decide` says when it declines.
"""

from torch import fx

from ...config import get_options
from ..base import Outcome, Pass


class ForwardFoldingPass(Pass):
    """Runs on the graph of the forward, or of inference; does nothing with ``forward="exact"``."""

    name = "forward_folding"
    hook = "post_grad_custom_pre_pass"  # before Inductor's own patterns fuse what is folded here

    def run(self, graph: fx.Graph) -> Outcome:
        options = get_options()
        if options.forward == "exact":
            return Outcome(0)
        # Here, because registering must not load a compiler.
        from .decide import decide_all
        from .rewrite import rewrite

        decided = decide_all(graph, options)
        folded = [candidate for candidate, record in decided if record.code.rewritten]
        if folded:
            rewrite(graph, folded)
        return Outcome(len(folded), tuple(record for _, record in decided))
