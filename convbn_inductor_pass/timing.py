"""Time the ways to compute a layer and what follows it, once per machine and shape.

A way is a call of a library and a few generated kernels around it. The library's call is made
here as compiled code makes it, memory formats included. For a generated kernel stands one
pointwise call of eager mode that reads and writes the same tensors. On CPU the ways take turns,
each beginning with its input in the processor's caches and its weight out of them, as after the
layers before it.

Results are kept where Inductor keeps those of its own autotuning.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _compat, epilogue, kernels, ops
from .affine import AffineChain
from .aten_ir import tensor_of, without_casts
from .epilogue import Activation, Residual

__all__ = ["AS_WRITTEN", "Workload", "seconds", "workload_of"]

aten = torch.ops.aten
AS_WRITTEN = "as written"

_ROUNDS, _FEWEST_ROUNDS = 9, 3
_SECONDS = 0.5  # of timing per workload, after which no round beyond the fewest begins


@dataclasses.dataclass(frozen=True)
class _Like:
    """What a tensor is like: hints of its sizes and strides, dtype, device."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str

    def make(self, dtype: torch.dtype | None = None) -> Tensor:
        out = torch.empty_strided(
            self.shape, self.stride, dtype=dtype or self.dtype, device=self.device
        )
        return out.fill_(0.5)  # no denormals, and no random numbers drawn


@dataclasses.dataclass(frozen=True)
class Workload:
    """A layer and what follows it, as far as it matters to the time: no nodes, no tensors.

    Attributes:
        target: the layer's operator.
        input, weight, output: its tensors, in the memory format that Inductor gives them.
        wide: dtype of the weight before autocast narrowed it.
        copies_weight: whether Inductor copies the weight into ``weight``'s memory format.
        bias, rest: whether it has a bias, and its other arguments.
        scales, shifts: what the affine chain does.
        activation: name, scalars and algorithm of the activation, if one follows.
        residual: "add" or "add+relu" if another tensor is added.
        ends: whether the result of all is written to memory, not taken over by another kernel.
        threads: that PyTorch computes with.
    """

    target: str
    input: _Like
    weight: _Like
    output: _Like
    wide: torch.dtype
    copies_weight: bool
    bias: bool
    rest: tuple[Any, ...]
    scales: bool
    shifts: bool
    activation: tuple[str, tuple[float, ...], str] | None
    residual: str
    ends: bool
    threads: int


def workload_of(
    chain: AffineChain, activation: Activation | None, residual: Residual | None, ends: bool
) -> Workload:
    """What to time for a layer, its affine chain and the epilogue that was recognised."""
    layer = chain.layer
    x, w, out = tensor_of(layer.input), tensor_of(layer.weight), layer.out
    wide = tensor_of(without_casts(layer.weight))
    if x is None or w is None or wide is None:
        raise AssertionError(f"{layer.node} has no metadata")
    weight = _like(w, channels_last=layer.is_conv)
    return Workload(
        target=str(layer.node.target),
        input=_like(x, channels_last=layer.is_conv),
        weight=weight,
        output=_like(out, channels_last=layer.is_conv),
        wide=wide.dtype,
        copies_weight=_moves(weight, _like(w, channels_last=False)),
        bias=layer.bias is not None,
        rest=_numbers(layer.node.args[3:]) if layer.is_conv else (),
        scales=chain.scales,
        shifts=chain.shifts,
        activation=None
        if activation is None
        else (activation.name, activation.scalars, activation.algorithm),
        residual="" if residual is None else "add+relu" if residual.relu else "add",
        ends=ends,
        threads=torch.get_num_threads(),
    )


def _numbers(value: Any) -> Any:
    """Stride, padding and so on, hints where they are symbolic."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_numbers, value))
    return value if isinstance(value, bool) else _compat.size_hint(value)


def _like(tensor: Tensor, *, channels_last: bool) -> _Like:
    shape = tuple(_compat.size_hint(s) for s in tensor.shape)
    stride = tuple(_compat.size_hint(s) for s in tensor.stride())
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    # On CPU, Inductor makes everything that goes through a convolution channels-last.
    if channels_last and tensor.device.type == "cpu" and tensor.ndim in formats:
        with _compat.real_tensors():
            meta = torch.empty(shape, device="meta", memory_format=formats[tensor.ndim])
        stride = meta.stride()
    return _Like(shape, stride, tensor.dtype, str(tensor.device))


def _moves(a: _Like, b: _Like) -> bool:
    """Whether the same numbers lie in another order in ``a`` and ``b``."""
    strides = [[s for size, s in zip(t.shape, t.stride, strict=True) if size != 1] for t in (a, b)]
    return strides[0] != strides[1]


def seconds(workload: Workload, kernels: Sequence[str], *, measure: bool) -> dict[str, float]:
    """Seconds as written (key ``AS_WRITTEN``) and folded with each of ``kernels``.

    Infinite for a kernel that refuses this layer. Empty if nothing is on file and ``measure``
    is False, or there is not enough memory.
    """
    system = (platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability())
    try:
        return _compat.lookup_timings(
            (AS_WRITTEN, *kernels),
            "convbn_inductor_pass",
            repr((workload, system)),
            (lambda names: _measure(workload, names)) if measure else None,
        )
    except torch.OutOfMemoryError:
        return {}


def _measure(workload: Workload, names: Sequence[str]) -> dict[str, float]:
    with _compat.real_tensors(), torch.no_grad():
        ways = _Ways(workload)
        functions = {name: ways.function(name) for name in names}
        times: dict[str, float] = {}
        for name in names:
            try:
                functions[name]()
            except RuntimeError as error:
                if name == AS_WRITTEN or isinstance(error, torch.OutOfMemoryError):
                    raise
                times[name] = float("inf")
                del functions[name]
        if workload.input.device == "cpu":
            return times | _take_turns(functions, ways.x)
        return times | {name: _compat.benchmark_gpu(f) for name, f in functions.items()}


def _take_turns(functions: dict[str, Callable[[], object]], x: Tensor) -> dict[str, float]:
    """Median seconds of each function, called in turns."""
    evict = torch.zeros(2 * _last_level_cache() // 4, dtype=torch.float32, device="cpu")
    samples: dict[str, list[float]] = {name: [] for name in functions}
    begin = time.perf_counter()
    for i in range(_ROUNDS):
        if i >= _FEWEST_ROUNDS and time.perf_counter() - begin > _SECONDS:
            break
        for name, function in functions.items():
            evict.add_(1)
            x.mul_(1)
            start = time.perf_counter()
            function()
            samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in samples.items()}


def _last_level_cache() -> int:
    """Bytes of the processor's last level of cache, or a usual number."""
    usual, most = 32 << 20, 256 << 20
    try:
        size = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on this system
        size = 0
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
        w = self.workload
        stride, padding, dilation, *_, groups = w.rest
        name, scalars, algorithm = w.activation or ("none", (), "")
        geometry = (padding, stride, dilation, groups)
        mkldnn, weight, bias = torch.ops.mkldnn, self._scaled(), self._shift()
        if self.other is None:
            return mkldnn._convolution_pointwise(
                self.x, weight, bias, *geometry, name, list(scalars), algorithm
            )
        relu = "relu" if w.residual == "add+relu" else None
        return mkldnn._convolution_pointwise_.binary(
            self.other, self.x, weight, bias, *geometry, "add", 1.0, relu, [], ""
        )

    def _linear(self) -> Tensor:
        post_op = self.workload.activation or ("none", (), "")
        out = self._matrix_product(self._scaled(), self._shift(), post_op)
        return torch.add(out, self.rows) if self.other is not None and self.workload.ends else out

    def _unfolded_linear(self) -> Tensor:
        w = self.workload
        weight = self._relaid() if w.wide != w.weight.dtype else self.weight
        out = self._matrix_product(weight, self.vector if w.bias else None, ("none", (), ""))
        if self.other is not None and w.ends:
            return torch.add(out, self.rows)
        return self._generated(out) if w.ends else out

    def _matrix_product(
        self, weight: Tensor, bias: Tensor | None, post_op: tuple[Any, ...]
    ) -> Tensor:
        x, name, scalars, algorithm = self.x, *post_op
        if self.workload.rest:
            for dim, step in enumerate(self.workload.rest[0], 2):
                x = x[(slice(None),) * dim + (slice(None, None, step),)]
            x = x.movedim(1, -1).reshape(-1, x.shape[1])
            weight = weight.reshape(weight.shape[0], -1)
        else:
            weight = weight.t()
        return ops.linear_pointwise(x, weight, bias, name, list(scalars), algorithm)

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
        if self.other is not None:
            return torch.add(out, self.other)
        return self._generated(out) if affine or w.activation is not None else out

    def _generated(self, out: Tensor) -> Tensor:
        """The affine map and the activation in one kernel."""
        w = self.workload
        if w.activation is not None:
            return epilogue.EAGER[w.activation[0]](out)
        return torch.relu(out) if w.scales or w.shifts else out
