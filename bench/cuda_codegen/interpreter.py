"""Run generated CUDA code on CPU tensors: Inductor's wrapper with kernels in Triton's interpreter.

Set ``TRITON_INTERPRET=1`` before Triton is imported. What libraries do, their CPU kernels do here.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from torch._inductor import async_compile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime.triton_heuristics import GridExpr
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from .recording import Graph, Lowered

__all__ = ["run_step"]

if os.environ.get("TRITON_INTERPRET") != "1":
    raise ImportError("TRITON_INTERPRET=1 has to be set before Triton is imported")

_cast = InterpreterBuilder.cast_impl


def _rounding_cast(self: Any, value: Any, dtype: Any) -> Any:
    """The interpreter's cast, which cuts float32 off to bfloat16 where a GPU rounds it."""
    if value.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
        return _cast(self, value, dtype)
    rounded = torch.from_numpy(np.ascontiguousarray(value.data)).bfloat16()
    return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)


# The interpreter has no body for these functions of CUDA's library, but for Triton's own.
_LIBDEVICE = re.compile(r"libdevice\.(rsqrt|sqrt|exp|log)\(")


def run_step(
    lowered: Lowered, inputs: tuple[Tensor, ...]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs of a step on CPU, and gradients by name, from a gradient of ones.

    Raises:
        ValueError: the network is not one forward graph and at most one backward graph.
    """
    phases = [graph.phase for graph in lowered.graphs]
    if phases not in (["forward"], ["forward", "backward"]):
        raise ValueError(f"expected a forward and perhaps a backward, got {phases}")
    model = lowered.model
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors |= {f"input {i}": x for i, x in enumerate(inputs)}
    values = {name: t.detach() for name, t in tensors.items()}
    forward = lowered.graphs[0]
    returned = _call(forward, [values[name] for name in forward.inputs])
    if len(lowered.graphs) == 1:
        return returned, {}
    backward = lowered.graphs[1]
    saved = {f"forward output {i}": t for i, t in enumerate(returned)}
    outputs = returned[: len(returned) - sum(name in saved for name in backward.inputs)]
    known = {**values, **saved}
    tangents = iter(torch.ones_like(o) for o in outputs)
    given = [known[name] if name else next(tangents) for name in backward.inputs]
    gradients = _call(backward, given)
    pairs = zip(forward.inputs, gradients, strict=True)
    return outputs, {name: gradient for name, gradient in pairs if gradient is not None}


def _call(graph: Graph, inputs: list[Tensor]) -> list[Any]:
    def empty(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype)

    class Kernels:
        def triton(self, name: str, source: str, device_str: str = "cuda") -> _Interpreted:
            return _Interpreted(name, source)

        def wait(self, scope: Any) -> None:
            pass

    source = graph.source.replace("device='cuda'", "device='cpu'")
    namespace: dict[str, Any] = {"__name__": "wrapper"}
    with (
        mock.patch.object(async_compile, "AsyncCompile", Kernels),
        mock.patch.object(torch._C._dynamo.guards, "_empty_strided_cuda", empty),
        mock.patch.object(InterpreterBuilder, "cast_impl", _rounding_cast),
        mock.patch.object(torch.cuda, "_DeviceGuard", return_value=contextlib.nullcontext()),
    ):
        exec(compile(source, "wrapper", "exec"), namespace)
        return list(namespace["call"](inputs))


class _Interpreted:
    """A kernel that Triton's interpreter runs, in the last of its configurations."""

    def __init__(self, name: str, source: str) -> None:
        tuner = getattr(PyCodeCache.load(_LIBDEVICE.sub(r"tl.\1(", source)), name)
        self.function, self.constants = tuner.fn, dict(tuner.configs[-1].kwargs)
        self.meta = tuner.inductor_meta

    def run(self, *args: Any, stream: Any = None) -> None:
        grid = GridExpr.from_meta(self.meta, self.constants, mode="python")
        of_grid = self.meta.get("extra_launcher_args", [])  # templates are told theirs, last
        own = len(args) - len(of_grid)
        names = [*self.function.arg_names[:own], *of_grid]
        known = {**dict(zip(names, args, strict=True)), **self.constants}
        sizes = [eval(str(g), {}, known) for g in (grid.x_grid, grid.y_grid, grid.z_grid)]
        self.function[tuple(sizes)](*args[:own], **self.constants)
