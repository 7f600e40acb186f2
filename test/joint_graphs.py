"""Joint graphs before and after the passes, as code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import fx

from convbn_inductor_pass import Code, Record, testing
from convbn_inductor_pass._torch import inductor, tracing


@dataclasses.dataclass(frozen=True)
class PassResult:
    """One joint graph before and after tune mode and wanted gradients, and what was decided."""

    before: str
    after: str
    records: tuple[Record, ...]

    @property
    def codes(self) -> list[Code]:
        """The codes of batch norms, one per call."""
        return [r.code for r in self.records if r.kind == "batch norm"]


def run_on_graph(graph: fx.Graph) -> PassResult:
    """Apply the passes to one graph in aten IR, whatever the flag says."""
    before = graph.python_code("self").src.strip()
    records = testing.run_on_graph(graph)
    return PassResult(before, graph.python_code("self").src.strip(), records)


def recording_backend(on_result: Callable[[PassResult], object]) -> Callable[..., Any]:
    """The fast backend; ``on_result`` gets what the passes did to each graph."""
    return testing.fast_backend(on_graph=lambda graph: on_result(run_on_graph(graph)))


def run_pass(fn: Callable[..., Any], *inputs: Any, dynamic: bool | None = None) -> list[PassResult]:
    """Trace ``fn`` on fake tensors and apply the passes: one result per graph in aten IR.

    Graphs inside a higher-order operator come before the graph that contains it.
    """
    results: list[PassResult] = []
    backend = recording_backend(results.append)

    def on_graph(gm: fx.GraphModule, example_inputs: list[Any]) -> None:
        with inductor.tracing_apart():
            backend(tracing.copy_graph_module(gm), example_inputs)

    tracing.trace(fn, inputs, on_graph, dynamic=dynamic)
    return results
