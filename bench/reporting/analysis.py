"""Questions to a set of rows: which providers ran a workload, medians, ratios per round."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable
from typing import Any

from ..results import Row
from ..workload import Settings

__all__ = ["Group", "Spread", "geometric_mean", "groups", "ratio", "spread"]


@dataclasses.dataclass(frozen=True)
class Group:
    """All providers' rows of one metric of one workload."""

    metric: str
    settings: Settings
    rows: dict[str, Row]

    def values(self, provider: str) -> dict[str, Any]:
        """The provider's values; empty if it did not run or failed."""
        row = self.rows.get(provider)
        return row.values if row is not None else {}

    def peak(self, provider: str) -> int | None:
        """Bytes of parameters, buffers and inputs, plus the peak of a step above them."""
        values = self.values(provider)
        if "peak_bytes" not in values:
            return None
        return values["resident_bytes"] + values["peak_bytes"]

    def label(self, *, size: bool = False) -> str:
        """The case, its size if asked for, and whatever is not the default."""
        s = self.settings
        parts = [s.case, "x".join(str(n) for n in (s.batch, *s.shape))] if size else [s.case]
        defaults = {"all", "float32", "contiguous"}
        parts += [v for v in (s.protocol, s.precision, s.memory_format) if v not in defaults]
        return " ".join(parts + (["dynamic"] if s.dynamic else []))


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and the quantiles around it that hold 60% of the samples."""

    median: float
    low: float
    high: float


def groups(rows: Iterable[Row], metric: str) -> list[Group]:
    """Rows of a metric by workload, in the order in which workloads first appear."""
    found: dict[Settings, dict[str, Row]] = {}
    for row in rows:
        if row.metric == metric:
            found.setdefault(row.settings, {})[row.provider] = row
    return [Group(metric, settings, by_provider) for settings, by_provider in found.items()]


def spread(samples: list[float]) -> Spread:
    """Raises ``statistics.StatisticsError`` if there are no samples."""
    if len(samples) < 2:
        return Spread(statistics.median(samples), min(samples), max(samples))
    cuts = statistics.quantiles(samples, n=5, method="inclusive")
    return Spread(statistics.median(samples), cuts[0], cuts[-1])


def ratio(group: Group, provider: str, other: str, name: str = "step_ms") -> float | None:
    """Median over the rounds of how long ``provider`` took relative to ``other``.

    Both were timed in every round, one soon after the other, so that what disturbs the machine
    for longer than a round does not enter. None if either has no times, or theirs are of another
    run.
    """
    ours, theirs = group.values(provider).get(name), group.values(other).get(name)
    if not ours or not theirs or group.rows[provider].run != group.rows[other].run:
        return None
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=False))


def geometric_mean(values: Iterable[float]) -> float | None:
    logs = [math.log(value) for value in values]
    return math.exp(statistics.fmean(logs)) if logs else None
