"""What Inductor's C++ code generation does slowly, said to it in another way."""

from __future__ import annotations

from torch import fx

from ..base import Outcome, Pass

__all__ = ["CpuCodegenPass"]


class CpuCodegenPass(Pass):
    """Runs on every graph that code is generated for; no value changes a bit."""

    name = "cpu_codegen"
    hook = "post_grad_custom_pre_pass"

    def run(self, graph: fx.Graph) -> Outcome:
        # Here, because registering must not load a compiler.
        from .invariants import store_invariants
        from .masks import rewrite_masks

        return Outcome(rewrite_masks(graph) + store_invariants(graph))
