"""Work around slow C++ code of Inductor's on CPU: :mod:`invariants`. No bit changes."""

from __future__ import annotations

from torch import fx

from ..base import Outcome, Pass

__all__ = ["CpuCodegenPass"]


class CpuCodegenPass(Pass):
    """Runs on every graph that code is generated for, after other passes have changed it."""

    name = "cpu_codegen"
    hook = "post_grad_custom_pre_pass"

    def run(self, graph: fx.Graph) -> Outcome:
        # Here, because registering must not load a compiler.
        from .invariants import store_invariants

        return Outcome(store_invariants(graph))
