"""The largest batch that fits a given memory, and the throughput there.

At each moment of a step, what is allocated is affine in the batch size: so much for parameters
and gradients, plus so much per example. The peak is the largest of these, so it may grow faster
from some batch on. Two measured peaks give a line, the line gives the largest batch under the
cap, and a run there confirms it and gives the throughput; if it needs more than the cap, the
line is drawn again, through that point. Each batch size is compiled separately.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from ..providers import Provider
from ..workload import Settings
from .measure import Budget, measure

__all__ = ["capacity", "largest_batch"]

_TRIES = 4


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
        small, large = (
            _point(settings, provider, batch, once)[0]
            for batch in (settings.batch, 2 * settings.batch)
        )
        result: dict[str, Any] = {"cap_bytes": cap_bytes, "largest_batch": 0}
        for _ in range(_TRIES):
            batch = largest_batch(small, large, cap_bytes)
            if batch == 0:
                break
            point, step_ms = _point(settings, provider, batch, whole)
            if point[1] <= cap_bytes:
                result["largest_batch"], result["needed_bytes"] = point
                result["examples_per_s"] = round(batch / statistics.median(step_ms) * 1e3, 2)
                break
            large = point
        seconds_each = time.monotonic() - started
        yield provider.name, result


def _point(
    settings: Settings, provider: Provider, batch: int, budget: Budget
) -> tuple[tuple[int, int], list[float]]:
    """(batch, bytes needed there) and the times of the steps."""
    settings = dataclasses.replace(settings, batch=batch)
    *_, (_, values) = measure(settings, [provider], budget, thorough=False)
    torch._dynamo.reset()
    return (batch, values["resident_bytes"] + values["peak_bytes"]), values["step_ms"]
