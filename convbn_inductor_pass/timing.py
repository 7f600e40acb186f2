"""Time the ways to compute a layer and what follows it, once per kind of processor and shape.

On CPU the ways (:mod:`ways`) take turns, each beginning with its inputs and the program in the
processor's caches and its weight out of them, as after the layers before it. On GPUs Inductor's
own benchmark times them.

Results are kept where Inductor keeps those of its own autotuning.
"""

from __future__ import annotations

import concurrent.futures
import functools
import pathlib
import platform
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import _compat, _inductor
from .ways import AS_WRITTEN, Ways
from .workload import Workload

__all__ = ["AS_WRITTEN", "seconds"]

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
            ways = others = Ways(workload)
            if workload.input.device == "cpu":
                others = Ways(workload)
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
