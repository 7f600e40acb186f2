"""The largest batch that fits a given memory, and the throughput there.

What a step needs is affine in the batch size: parameters and gradients, plus so much per
example. Two measured peaks give the line, the line gives the largest batch under the cap, and a
run at that batch confirms it and gives the throughput. Each batch size is compiled anew.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import torch

from .measure import Budget, measure
from .providers import Provider
from .workload import Settings

__all__ = ["capacity", "largest_batch"]


def largest_batch(small: tuple[int, float], large: tuple[int, float], cap: float) -> int:
    """Largest batch whose memory is at most ``cap``, from two points (batch, bytes).

    Raises:
        ValueError: memory does not grow from the first point to the second.
    """
    per_example = (large[1] - small[1]) / (large[0] - small[0])
    if per_example <= 0:
        raise ValueError(f"memory does not grow with the batch: {small}, {large}")
    return max(0, int((cap - small[1]) / per_example) + small[0])


def capacity(
    settings: Settings, providers: list[Provider], budget: Budget, cap_bytes: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (provider, values), one provider after the other.

    ``settings.batch`` is the smaller of the two batch sizes, twice that the larger.

    Raises:
        NotApplicable, MissingLibrary: as :func:`bench.workload.setup`.
    """
    whole = dataclasses.replace(budget, deadline=math.inf)
    once = dataclasses.replace(whole, rounds=1)
    seconds_each = 0.0
    for provider in providers:
        started = time.monotonic()
        if started + seconds_each > budget.deadline:
            break
        needed = []
        for batch in (settings.batch, 2 * settings.batch):
            values = _last(dataclasses.replace(settings, batch=batch), provider, once)
            needed.append((batch, values["resident_bytes"] + values["peak_bytes"]))
        batch = largest_batch(needed[0], needed[1], cap_bytes)
        result: dict[str, Any] = {"cap_bytes": cap_bytes, "needed_bytes": needed}
        result["largest_batch"] = batch
        if batch > 0:
            values = _last(dataclasses.replace(settings, batch=batch), provider, whole)
            seconds = sorted(values["step_ms"])[len(values["step_ms"]) // 2] / 1e3
            result["confirmed_bytes"] = values["resident_bytes"] + values["peak_bytes"]
            result["examples_per_s"] = round(batch / seconds, 2)
        seconds_each = time.monotonic() - started
        yield provider.name, result


def _last(settings: Settings, provider: Provider, budget: Budget) -> dict[str, Any]:
    *_, (_, values) = measure(settings, [provider], budget, cold=False)
    torch._dynamo.reset()
    return values
