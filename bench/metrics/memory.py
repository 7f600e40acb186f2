"""Peak memory of tensors, on CUDA and on CPU."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_bytes", "release", "resident_bytes"]


def release() -> None:
    """Free what is unreachable, so that it is not counted."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def resident_bytes(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Bytes of parameters, buffers and inputs, which are there before, in and after a step."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers(), *inputs))


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """Most bytes allocated at once during a call, above what was allocated before it.

    On CUDA from the caching allocator. On CPU from the profiler's record of every allocation
    of a tensor, which repeats exactly but does not see oneDNN's own scratch memory.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    now = peak = 0
    for event in events:
        now += event.nbytes()
        peak = max(peak, now)
    return peak
