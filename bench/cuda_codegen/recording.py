"""Take notes of what Inductor generates and of what a step of it launches, allocates and saves."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._inductor import async_compile, config, output_code, select_algorithm
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..workload import Workload

__all__ = ["Graph", "Lowered", "Recorder", "recording"]


@dataclasses.dataclass
class Graph:
    """One generated graph.

    Attributes:
        phase: "forward" (of training or inference) or "backward".
        source: of Inductor's wrapper.
        kernel_bytes: what its generated kernels read and write, as Inductor's scheduler counts.
        inputs: what it was called with: the name of a parameter, buffer or input of the network,
            "forward output 3", or "" for another tensor: a gradient of the outputs.
    """

    phase: str
    source: str
    kernel_bytes: int
    inputs: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Lowered:
    """A workload as one provider has it compiled.

    Attributes:
        model: the network with its values, on CPU.
        graphs: in the order in which they were generated.
        kernels: sources of generated kernels by name.
        launches: by phase the generated kernels and the library calls of a step, in order.
        saved_bytes: held by autograd between forward and backward, but for what is alive anyway.
        resident_bytes: of parameters, buffers and inputs.
        peak_bytes: the most that is allocated at once in a step above these, gradients included.
    """

    model: nn.Module
    graphs: list[Graph] = dataclasses.field(default_factory=list)
    kernels: dict[str, str] = dataclasses.field(default_factory=dict)
    launches: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    saved_bytes: int = 0
    resident_bytes: int = 0
    peak_bytes: int = 0

    def kernel_bytes(self, phase: str) -> int:
        return sum(g.kernel_bytes for g in self.graphs if g.phase == phase)


class _Memory:
    """Bytes of the storages that are alive. The most is met where something is allocated."""

    def __init__(self) -> None:
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.now = self.peak = 0

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.now = sum(nbytes for _, nbytes in self.alive.values())
        self.peak = max(self.peak, self.now)


# Calls that allocate, or make a view, and launch nothing.
_LAUNCH_NOTHING = {
    "aten::_unsafe_view",
    "aten::alias",
    "aten::as_strided",
    "aten::detach",
    "aten::empty.memory_format",
    "aten::empty_strided",
    "aten::permute",
    "aten::t",
    "aten::view",
}


class _Calls(TorchDispatchMode):
    """Notes operators that a wrapper calls, and what they allocate."""

    def __init__(self, launches: list[str], memory: _Memory) -> None:
        super().__init__()
        self.launches, self.memory = launches, memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # asks for a property
            return result
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.memory.add(leaf)
        if func.name() not in _LAUNCH_NOTHING:
            self.launches.append(func.name())
        return result


class _StandIn:
    """In the place of a generated kernel."""

    def __init__(self, name: str, on_launch: Callable[[str], None]) -> None:
        self.name, self.on_launch = name, on_launch

    def run(self, *args: Any, **kwargs: Any) -> None:
        self.on_launch(self.name)


class Recorder:
    """Runs steps of a compiled workload and fills a :class:`Lowered`."""

    def __init__(self, result: Lowered) -> None:
        self.result = result
        self.phase = ""
        self.memory: _Memory | None = None  # while a step is measured
        self.names: dict[Any, str] = {}

    def compile(self, workload: Workload, function: Callable[..., Any]) -> None:
        """The first step. All that graphs return stays alive, so that names are unambiguous."""
        model = workload.model
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        tensors |= {f"input {i}": x for i, x in enumerate(workload.inputs)}
        self.names = {_identity(t): name for name, t in tensors.items()}
        self.outputs: list[Any] = []
        self._step(workload, function, lambda tensor: tensor)
        self.outputs.clear()

    def run(self, workload: Workload, function: Callable[..., Any]) -> None:
        """Another step, of which launches, bytes and the peak are noted."""
        result, self.memory = self.result, _Memory()
        workload.clear_gradients(workload.model)
        model, saved = workload.model, {}
        for tensor in (*model.parameters(), *model.buffers(), *workload.inputs):
            self.memory.add(tensor)
        resident = set(self.memory.alive)
        result.resident_bytes = self.memory.now

        def save(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in resident:
                saved[storage._cdata] = storage.nbytes()
            return tensor

        self._step(workload, function, save)
        result.saved_bytes = sum(saved.values())
        result.peak_bytes = self.memory.peak - result.resident_bytes
        self.memory = None

    def _step(
        self, workload: Workload, function: Callable[..., Any], save: Callable[[Tensor], Tensor]
    ) -> None:
        self.phase = "forward"
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            outputs = workload.forward(function)
        if workload.protocol.trains:
            self.phase = "backward"
            workload.backward(outputs)

    def on_codegen(self, graph: GraphLowering, source: str) -> None:
        phase = "backward" if graph.is_backward else "forward"
        library = (ExternKernelSchedulerNode, NopKernelSchedulerNode)
        generated = [n for n in graph.scheduler.nodes if not isinstance(n, library)]
        moved = sum(n.get_read_write_buffers_sizes() for n in generated)
        self.result.graphs.append(Graph(phase, source, int(moved)))

    def on_kernel(self, name: str, source: str) -> _StandIn:
        self.result.kernels[name] = source
        return _StandIn(name, self.on_launch)

    def on_launch(self, name: str) -> None:
        if self.memory is not None:
            self.result.launches.setdefault(self.phase, []).append(name)

    def on_call(self, call: Callable[[Any], Any], inputs: Any) -> Any:
        """A graph is called. The mode is set here: around Dynamo's code it would turn that off."""
        if self.memory is not None:
            launches = self.result.launches.setdefault(self.phase, [])
            with _Calls(launches, self.memory):
                return call(inputs)
        names = [self.names.get(_identity(t), "") for t in inputs]
        outputs = call(inputs)
        for graph in self.result.graphs:
            if graph.phase == self.phase and not graph.inputs:
                graph.inputs = names
                break
        self.outputs += outputs
        for i, tensor in enumerate(outputs):
            self.names.setdefault(_identity(tensor), f"{self.phase} output {i}")
        return outputs


def _identity(value: Any) -> Any:
    """What tells views of one storage apart; equal for a tensor and an alias of it."""
    if not isinstance(value, Tensor):
        return None
    storage = value.untyped_storage()._cdata
    return (storage, value.storage_offset(), tuple(value.shape), value.stride())


@contextlib.contextmanager
def recording(result: Lowered) -> Iterator[Recorder]:
    """Compile with stand-ins for kernels inside; caches are off, nothing is tried out.

    Where Inductor would time a library's call beside its templates, the first template is taken.
    """
    recorder = Recorder(result)
    codegen, call = GraphLowering.codegen, output_code.CompiledFxGraph.__call__

    def codegen_noted(graph: GraphLowering) -> Any:
        generated = codegen(graph)
        recorder.on_codegen(graph, generated[0].value)
        return generated

    def call_noted(graph: Any, inputs: Any) -> Any:
        return recorder.on_call(lambda given: call(graph, given), inputs)

    def triton(self: Any, name: str, source: str, device_str: str = "cuda") -> _StandIn:
        return recorder.on_kernel(name, source)

    def empty(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device="cuda")

    def made_up_times(*args: Any, **kwargs: Any) -> Callable[..., dict[Any, float]]:
        template = select_algorithm.TritonTemplateCaller
        return lambda choices: {
            c: float(i if isinstance(c, template) else len(choices)) + 1
            for i, c in enumerate(choices)
        }

    def nothing(*args: Any) -> None:  # a mock would keep the tensors that it was called with
        pass

    guards = torch._C._dynamo.guards
    with (
        mock.patch.object(GraphLowering, "codegen", codegen_noted),
        mock.patch.object(output_code.CompiledFxGraph, "__call__", call_noted),
        mock.patch.object(async_compile.AsyncCompile, "triton", triton),
        mock.patch.object(
            select_algorithm.AlgorithmSelectorCache, "make_benchmark_fn", made_up_times
        ),
        mock.patch.object(guards, "_empty_strided_cuda", empty),
        mock.patch.object(guards, "_reinterpret_tensor", torch.as_strided),
        mock.patch.object(guards, "assert_alignment", nothing),
        config.patch(
            force_disable_caches=True,
            shape_padding=False,
            compile_threads=1,
            benchmark_epilogue_fusion=False,
            autotune_num_choices_displayed=0,
        ),
        functorch_config.patch(enable_autograd_cache=False),
    ):
        yield recorder
