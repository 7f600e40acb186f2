"""Where the time of a step goes: its kernels, as PyTorch's profiler sees them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["kernels"]

_MOST = 30


def kernels(step: Callable[[], object], device: str) -> list[tuple[str, int, float]]:
    """Name, calls and milliseconds of what one ``step`` runs, the slowest first.

    On CUDA kernels, on CPU operators and generated functions, each without what it calls.
    """
    cuda = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        step()
        if cuda:
            torch.cuda.synchronize()
    found = [
        (e.key[:120], e.count, (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1e3)
        for e in profiler.key_averages()
    ]
    slowest = sorted(found, key=lambda kernel: -kernel[2])[:_MOST]
    return [(name, calls, float(f"{ms:.4g}")) for name, calls, ms in slowest]
