"""What Inductor made of a network, seen while it compiles: kernels, traffic, time of the passes."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from torch._inductor import metrics
from torch._inductor.fx_passes import pre_grad
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode

from convbn_inductor_pass.passes import Pass

__all__ = ["Codegen", "recording"]


@dataclasses.dataclass
class Codegen:
    """Sums over the graphs of a network, forward and backward.

    ``generated_kernels`` are Inductor's own (Triton or C++), ``extern_kernels`` calls of
    libraries (convolutions, matrix products), ``bytes_moved`` what all of them read and write,
    as Inductor's scheduler counts it. ``pass_seconds`` is the time spent in conv-BN passes, ours or
    PyTorch's.
    """

    generated_kernels: int = 0
    extern_kernels: int = 0
    bytes_moved: int = 0
    graphs: int = 0
    pass_seconds: float = 0.0


@contextlib.contextmanager
def recording() -> Iterator[Codegen]:
    """Fill a :class:`Codegen` with what is compiled inside. Caches must be off."""
    seen = Codegen()
    compile_to_module = GraphLowering.compile_to_module

    def compile_and_count(graph: GraphLowering) -> Any:
        kernels = metrics.generated_kernel_count
        module = compile_to_module(graph)
        seen.generated_kernels += metrics.generated_kernel_count - kernels
        seen.extern_kernels += sum(
            isinstance(node, ExternKernelSchedulerNode) for node in graph.scheduler.nodes
        )
        seen.bytes_moved += int(graph.count_bytes()[0])
        seen.graphs += 1
        return module

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seen.pass_seconds += time.perf_counter() - start

        return call

    builtin = pre_grad.efficient_conv_bn_eval_pass
    with (
        mock.patch.object(GraphLowering, "compile_to_module", compile_and_count),
        mock.patch.object(Pass, "__call__", timed(Pass.__call__)),
        mock.patch.object(builtin, "apply", timed(builtin.apply)),
    ):
        yield seen
