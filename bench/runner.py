"""Run jobs one after the other, write what they give, and go on where one fails."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .libraries import MissingLibrary
from .metrics import memory
from .metrics.capacity import capacity
from .metrics.cuda_codegen import cuda_codegen
from .metrics.measure import Budget, measure
from .metrics.saved import saved_bytes
from .protocols import PROTOCOLS, NotApplicable
from .providers import PROVIDERS
from .results import ResultFile, Row
from .workload import Settings

__all__ = ["METRICS", "Job", "run"]

METRICS = ("saved", "measure", "capacity", "cuda-codegen")


@dataclasses.dataclass(frozen=True)
class Job:
    """One metric of one workload for some providers.

    ``cap_bytes`` is for "capacity" only: the memory that the batch has to fit.
    """

    metric: str
    settings: Settings
    providers: tuple[str, ...]
    cap_bytes: int = 0

    def __str__(self) -> str:
        s = self.settings
        size = "x".join(str(n) for n in (s.batch, *s.shape))
        extra = [] if s.memory_format == "contiguous" else [s.memory_format]
        extra += ["dynamic"] if s.dynamic else []
        return " ".join([self.metric, s.case, size, s.protocol, s.precision, *extra])


def run(
    jobs: list[Job],
    file: ResultFile,
    budget: Budget,
    *,
    on_start: Callable[[Job], None],
    on_row: Callable[[Row], None],
) -> None:
    """Run ``jobs`` into ``file``; what the file has already is not run again.

    A missing library or an error becomes a row that says so, and the next job is run. Jobs
    that would start after the budget's deadline are left for another run.
    """
    for job in jobs:
        if time.monotonic() > budget.deadline:
            return
        on_start(job)
        protocol = PROTOCOLS[job.settings.protocol]
        names = [name for name in job.providers if PROVIDERS[name].is_for(protocol)]
        if all(file.has(job.metric, job.settings, name) for name in names):
            continue
        try:
            for name, values in _values(job, names, budget):
                row = Row(job.metric, job.settings, name, values)
                file.add(row)
                on_row(row)
        except (MissingLibrary, NotApplicable) as reason:
            _add_problem(job, names, str(reason), file, on_row)
        except Exception as error:  # one failing case must not end a run of hours
            _add_problem(job, names, f"{type(error).__name__}: {error}"[:500], file, on_row)
        torch._dynamo.reset()
        memory.release()


def _add_problem(
    job: Job, providers: list[str], problem: str, file: ResultFile, on_row: Callable[[Row], None]
) -> None:
    for name in providers:
        if not file.has(job.metric, job.settings, name):
            row = Row(job.metric, job.settings, name, problem=problem)
            file.add(row)
            on_row(row)


def _values(job: Job, names: list[str], budget: Budget) -> Iterator[tuple[str, dict[str, Any]]]:
    providers = [PROVIDERS[name] for name in names]
    if job.metric == "saved":
        yield from saved_bytes(job.settings, providers).items()
    elif job.metric == "measure":
        yield from measure(job.settings, providers, budget)
    elif job.metric == "cuda-codegen":
        yield from cuda_codegen(job.settings, providers)
    elif job.metric == "capacity":
        yield from capacity(job.settings, providers, budget, job.cap_bytes)
    else:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {job.metric!r}")
