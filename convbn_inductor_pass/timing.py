"""Time the ways to compute a layer and what follows it, once per kind of processor and shape.

A way is a call of a library and a few generated kernels around it. The library's call is made
here as compiled code makes it, memory formats included. For a generated kernel stand
pointwise calls of eager mode on the same tensors, in place. On CPU the ways take turns, each
beginning with its inputs and the program in the processor's caches and its weight out of them, as
after the layers before it. On GPUs Inductor's own benchmark times them.

Results are kept where Inductor keeps those of its own autotuning.
"""

from __future__ import annotations

import concurrent.futures
import functools
import pathlib
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _compat, _inductor, epilogue, fingerprint, kernels, ops
from .workload import Workload

__all__ = ["AS_WRITTEN", "seconds"]

aten = torch.ops.aten
AS_WRITTEN = "as written"

_METHOD = 5  # part of the key: count up when something else is timed
_ROUNDS, _FEWEST_ROUNDS = 15, 3
_SECONDS = 0.5  # of timing per workload, after which no round beyond the fewest begins
# After the fewest rounds, ways slower than the fastest by more drop out.
_CLOSE = 1.3


def seconds(workload: Workload, kernels: Sequence[str], *, measure: bool) -> dict[str, float]:
    """Seconds as written (key ``AS_WRITTEN``) and folded with each of ``kernels``.

    Infinite for a kernel that refuses this layer. Where ``measure`` is False, those that are on
    file. Empty if there is not enough memory, or the layer cannot be computed here.
    """
    try:
        return _inductor.lookup_timings(
            (AS_WRITTEN, *kernels),
            "convbn_inductor_pass",
            repr((_METHOD, _system(), workload)),
            (lambda names: _measure(workload, names)) if measure else None,
        )
    except _CannotMeasureError:
        return {}


@functools.cache
def _processor() -> tuple[object, ...]:
    """What kind of processor this is: on Linux, Python's ``platform`` often does not say."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    names = [line for line in lines if line.startswith(("vendor", "cpu family", "model", "CPU "))]
    return platform.machine(), platform.processor(), *names, _last_level_cache()


class _CannotMeasureError(Exception):
    """Not even as it is written can the layer be computed, for want of memory above all."""


def _system() -> tuple[object, ...]:
    """What times depend on besides the workload, if Inductor's cache does not know it already.

    It knows the GPU, and the precision of matrix products in float32.
    """
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    return (
        *(torch.__version__, *_processor()),
        torch.backends.cpu.get_cpu_capability(),
        *(cudnn.version(), cudnn.benchmark, cudnn.conv.fp32_precision),  # type: ignore[attr-defined]
        mkldnn.conv.fp32_precision,  # type: ignore[attr-defined]
    )


def _measure(workload: Workload, names: Sequence[str]) -> dict[str, float]:
    if workload.input.device != "cpu":
        return _measure_here(workload, names)

    def measure() -> dict[str, float]:
        torch.get_num_threads()  # has the first call in a thread set their number for MKL
        return _measure_here(workload, names)

    # While PyTorch compiles, each call of an operator takes 12 us longer, and calls of Python
    # functions take longer, too: a good part of a small layer's time. Only in this thread.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(measure).result()


def _measure_here(workload: Workload, names: Sequence[str]) -> dict[str, float]:
    with _compat.real_tensors(), torch.no_grad():
        try:
            ways = others = _Ways(workload)
            if workload.input.device == "cpu":
                others = _Ways(workload)
        except RuntimeError as error:  # on CPU no other kind tells that there is no memory
            raise _CannotMeasureError from error
        functions = {name: (ways.function(name), others.function(name)) for name in names}
        times: dict[str, float] = {}
        for name in names:
            try:
                for function in functions[name]:
                    function()
            except RuntimeError as error:
                if name == AS_WRITTEN or isinstance(error, torch.OutOfMemoryError):
                    raise _CannotMeasureError from error
                times[name] = float("inf")
                del functions[name]
        if workload.input.device == "cpu":
            inputs = [t for t in (ways.other, ways.x) if t is not None]
            return times | _take_turns(functions, inputs)
        for name, (function, _) in functions.items():
            times[name] = _inductor.benchmark_gpu(function, ways.x.device)
        return times


def _take_turns(
    functions: dict[str, tuple[Callable[[], object], Callable[[], object]]],
    inputs: Sequence[Tensor],
) -> dict[str, float]:
    """Seconds of each function's fastest call, in turns: what disturbs only ever adds.

    ``inputs`` are what layers before have computed for the first one of each pair, which is timed.
    The second one does the same with other tensors.
    """
    evict = torch.zeros(2 * _last_level_cache() // 4, dtype=torch.float32, device="cpu")
    samples: dict[str, list[float]] = {name: [] for name in functions}
    begin = time.perf_counter()
    for i in range(_ROUNDS):
        if i >= _FEWEST_ROUNDS:
            if time.perf_counter() - begin > _SECONDS:
                break
            close = _CLOSE * min(map(min, samples.values()))
            functions = {n: f for n, f in functions.items() if min(samples[n]) <= close}
        for name, (function, other) in functions.items():
            evict.sum()  # not written to: a cache that has to write back first is slow
            other()  # brings the program itself back, which other layers' calls keep in the caches
            for tensor in inputs:
                tensor.mul_(1)
            start = time.perf_counter()
            function()
            samples[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in samples.items()}


def _last_level_cache() -> int:
    """Bytes of the processor's last level of cache, or a usual number."""
    usual, most = 32 << 20, 256 << 20
    size = 0
    for path in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()  # "32768K"; sysconf may count all of a host's caches
        size = max(size, int(text.removesuffix("K")) << 10 if text.endswith("K") else 0)
    return min(size, most) if size > 0 else usual


class _Ways:
    """Tensors like a workload's, and a function for each way to compute it."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.x = workload.input.make()
        self.weight = workload.weight.make(workload.wide)
        if workload.copies_weight:
            self.weight = self.weight.contiguous()
        device, dtype = workload.output.device, workload.output.dtype
        self.vector = torch.full((workload.output.shape[1],), 0.5, dtype=dtype, device=device)
        # Output channels come second in a matrix product's and a transposed convolution's weight.
        sizes = [1] * self.weight.ndim
        axis = 1 if not workload.rest or workload.rest[3] else 0
        sizes[axis] = self.weight.shape[axis]
        self.scale = torch.full(sizes, 0.5, dtype=self.weight.dtype, device=device)
        # Made once: the memory allocator's moods are not what is to be compared.
        self.relaid = workload.weight.make()
        self.narrow_scale = self.scale.to(workload.weight.dtype)
        self.other = workload.output.make() if workload.residual else None
        if self.other is not None:
            self.rows = self.other.movedim(1, -1).reshape(-1, self.other.shape[1])

    def function(self, name: str) -> Callable[[], object]:
        return {
            AS_WRITTEN: self._as_written,
            kernels.ATEN: self._aten,
            kernels.ONEDNN: self._onednn,
            kernels.PACKED: self._packed,
            kernels.CUDNN: self._cudnn,
            kernels.LINEAR: self._linear,
            kernels.UNFOLDED_LINEAR: self._unfolded_linear,
        }[name]

    def _as_written(self) -> Tensor:
        w = self.workload
        weight = self._relaid() if w.copies_weight or w.wide != w.weight.dtype else self.weight
        return self._epilogue(self._layer(weight, self.vector if w.bias else None), affine=True)

    def _aten(self) -> Tensor:
        return self._epilogue(self._layer(self._scaled(), self._shift()), affine=False)

    def _onednn(self) -> Tensor:
        return self._with_post_ops(self._scaled(), self._shift())

    def _packed(self) -> Tensor:
        self._read()
        w = self.workload
        return self._with_post_ops(self._pack, self.vector if w.shifts or w.bias else None)

    @functools.cached_property
    def _read(self) -> Callable[[], object]:
        return fingerprint.reader(self.weight)

    @functools.cached_property
    def _pack(self) -> Tensor:
        w = self.workload
        stride, padding, dilation, *_, groups = w.rest
        weight = self.weight.to(w.weight.dtype)
        return ops.pack(weight, padding, stride, dilation, groups, w.input.shape)

    def _with_post_ops(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        w = self.workload
        stride, padding, dilation, *_, groups = w.rest
        name, scalars, algorithm = w.activation or ("none", (), "")
        geometry = (padding, stride, dilation, groups)
        mkldnn = torch.ops.mkldnn
        if self.other is None:
            return mkldnn._convolution_pointwise.default(
                self.x, weight, bias, *geometry, name, list(scalars), algorithm
            )
        relu = "relu" if w.residual == "add+relu" else None
        return mkldnn._convolution_pointwise_.binary(
            self.other, self.x, weight, bias, *geometry, "add", 1.0, relu, [], ""
        )

    def _cudnn(self) -> Tensor:
        stride, padding, dilation, *_, groups = self.workload.rest
        inputs = (self.x, self._scaled(), self._shift(), self.other)
        return ops.convolution_relu(*inputs, stride, padding, dilation, groups)

    def _linear(self) -> Tensor:
        post_op = self.workload.activation or ("none", (), "")
        out = self._linear_layer(self._scaled(), self._shift(), post_op)
        return out.add_(self.rows) if self.other is not None and self.workload.ends else out

    def _unfolded_linear(self) -> Tensor:
        w = self.workload
        weight = self._relaid() if w.wide != w.weight.dtype else self.weight
        out = self._linear_layer(weight, self.vector if w.bias else None, ("none", (), ""))
        return self._epilogue(out, affine=True)

    def _linear_layer(
        self, weight: Tensor, bias: Tensor | None, post_op: tuple[Any, ...]
    ) -> Tensor:
        name, scalars, algorithm = post_op
        weight = weight.reshape(weight.shape[0], -1) if self.workload.rest else weight.t()
        return ops.linear_pointwise(self._input(), weight, bias, name, list(scalars), algorithm)

    def _input(self) -> Tensor:
        """The input's rows: a view, or a copy where there is none, as with a stride."""
        if not self.workload.rest:
            return self.x
        return self._rows_of_x() if self._rows is None else self._rows

    @functools.cached_property
    def _rows(self) -> Tensor | None:
        # Views are made once: in eager mode they take a good part of a small product's time.
        rows = self._rows_of_x()
        return rows if rows.data_ptr() == self.x.data_ptr() else None

    def _rows_of_x(self) -> Tensor:
        x = self.x
        for dim, step in enumerate(self.workload.rest[0], 2):
            x = x[(slice(None),) * dim + (slice(None, None, step),)]
        return x.movedim(1, -1).reshape(-1, x.shape[1])

    def _layer(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.workload.rest:
            return aten.convolution.default(self.x, weight, bias, *self.workload.rest)
        if bias is None:
            return aten.mm.default(self.x, weight)
        return aten.addmm.default(bias, self.x, weight)

    def _relaid(self) -> Tensor:
        """The weight in the layer's dtype and memory format: one generated kernel."""
        if self.workload.wide != self.workload.weight.dtype:
            return self.relaid.copy_(self.weight)
        # Eager mode's copy between memory formats is several times slower than a generated one.
        return torch.mul(self.weight, 1.0, out=self.relaid)

    def _scaled(self) -> Tensor:
        """The same, and scaled."""
        w = self.workload
        if w.copies_weight or w.wide != w.weight.dtype:
            weight = self._relaid()
            return weight.mul_(self.narrow_scale) if w.scales else weight
        return torch.mul(self.weight, self.scale, out=self.relaid) if w.scales else self.weight

    def _shift(self) -> Tensor | None:
        w = self.workload
        return torch.add(self.vector, self.vector) if w.shifts else self.vector if w.bias else None

    def _epilogue(self, out: Tensor, *, affine: bool) -> Tensor:
        """What the layer's kernel does not compute, if a kernel of its own computes it."""
        w = self.workload
        if not w.ends:
            return out
        affine = affine and (w.scales or w.shifts)
        kernel: list[Callable[[], object]] = []
        if affine:
            v = self.vector if out.ndim == 2 else self.vector.view(-1, *[1] * (out.ndim - 2))
            kernel.append(lambda: torch.addcmul(v, out, v, out=out))
        if self.other is not None:
            other = self.other if out.ndim != 2 else self.rows
            kernel.append(lambda: out.add_(other))
        elif w.activation is not None:
            activation = epilogue.IN_PLACE[w.activation[0]]
            kernel.append(lambda: activation(out))
        # What adds up was measured on CPU only. Elsewhere the last call stands for the kernel.
        for call in kernel if out.device.type == "cpu" else kernel[-1:]:
            call()
        return out
