"""Measured metrics: time of a step, peak memory, compile time, and agreement with eval mode.

All providers of a workload are compiled first and then take turns, one step each per round in
an order that rotates, so that a machine that gets slower or busier does so for all of them.
The samples of every round are recorded; reports take medians, quantiles and ratios per round.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._inductor.utils import fresh_cache

from ..providers import Provider
from ..workload import Settings, Workload, setup
from . import codegen, memory
from .profile import kernels

__all__ = ["Budget", "keep_freed_memory", "measure"]


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long to measure: at most ``rounds``, and no new one after ``seconds`` of timing.

    ``deadline``, on the clock of :func:`time.monotonic`, is for a run that must end: no
    provider is begun that is likely to compile beyond it, and no round after it. With ``profile``
    one more step of each provider is profiled.
    """

    rounds: int = 20
    seconds: float = 60.0
    deadline: float = math.inf
    profile: bool = False


@dataclasses.dataclass
class _Runner:
    """A provider that is compiled and warm."""

    provider: Provider
    workload: Workload
    model: nn.Module
    function: Callable[..., Any]
    values: dict[str, Any]
    samples: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def begin(self) -> None:
        """Tell CUDA graphs that the last step's results are done with."""
        if self.workload.settings.device == "cuda":
            torch.compiler.cudagraph_mark_step_begin()

    def step(self) -> tuple[Tensor, ...]:
        self.begin()
        outputs = self.workload.forward(self.function)
        if self.workload.protocol.trains:
            self.workload.backward(outputs)
        return outputs

    def clear(self) -> None:
        self.workload.clear_gradients(self.model)

    def timed_step(self) -> None:
        """One step, timed; gradients are cleared before, outside the time."""
        self.clear()
        self.begin()
        workload, clock = self.workload, _Clock(self.workload.settings.device)
        clock.mark()
        outputs = workload.forward(self.function)
        clock.mark()
        if workload.protocol.trains:
            workload.backward(outputs)
            clock.mark()
        laps = clock.laps_ms()
        times = {"step_ms": sum(laps)}
        if workload.protocol.trains:
            times |= {"forward_ms": laps[0], "backward_ms": laps[1]}
        for name, value in times.items():
            self.samples.setdefault(name, []).append(float(f"{value:.5g}"))


class _Clock:
    """Wall time on CPU; on CUDA, events on the stream, begun when the device is idle."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.marks: list[Any] = []
        if self.cuda:
            torch.cuda.synchronize()

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def laps_ms(self) -> list[float]:
        pairs = list(zip(self.marks[:-1], self.marks[1:], strict=True))
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in pairs]
        return [(b - a) * 1e3 for a, b in pairs]


def measure(
    settings: Settings, providers: list[Provider], budget: Budget, *, thorough: bool = True
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (provider, values) twice: once compiled, with memory, and again with the times.

    Whoever writes results as they come keeps the first ones if the run is cut off; the second
    ones contain them. With ``thorough``, each provider compiles into an empty cache folder,
    so that none finds kernels of another, and is checked against eager eval mode. Without, the
    first step's time means little, and no eager step is run, which may not fit the memory.

    Raises:
        NotApplicable, MissingLibrary: as :func:`bench.workload.setup`.
    """
    keep_freed_memory()
    _warm_up(settings.device)
    workload = setup(settings)
    reference = _results(workload, workload.model, workload.model) if thorough else None
    runners: list[_Runner] = []
    for provider in providers:
        longest = max((r.values["first_step_s"] for r in runners), default=0.0)
        if time.monotonic() + longest > budget.deadline:
            break
        runner = _start(provider, workload, reference)
        runners.append(runner)
        yield provider.name, dict(runner.values)
    _take_turns(runners, budget)
    for runner in runners:
        if budget.profile:
            runner.values["kernels"] = kernels(runner.step, settings.device)
            runner.clear()
        yield runner.provider.name, {**runner.values, **runner.samples}


@functools.cache
def keep_freed_memory() -> bool:
    """Make glibc's malloc keep what is freed in this process; whether that could be done.

    By default it gives large blocks back to the system, when and how many depending on what else
    is alive, and each step then pays for page faults on the same memory again. All providers
    share the process, so that it holds for all of them alike.
    """
    trim_threshold, mmap_max = -1, -4  # names of parameters in malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return bool(mallopt(trim_threshold, -1)) and bool(mallopt(mmap_max, 0))


@functools.cache
def _warm_up(device: str) -> None:
    """Compile something small once: the first compilation of a process pays for imports."""
    x = torch.randn(2, device=device, requires_grad=True)
    torch.compile(torch.sin)(x).sum().backward()
    torch._dynamo.reset()


def _take_turns(runners: list[_Runner], budget: Budget) -> None:
    if not runners:  # out of time before the first
        return
    end = min(time.monotonic() + budget.seconds, budget.deadline)
    with dynamo_config.patch(error_on_recompile=True):
        for turn in range(budget.rounds):
            if turn >= 3 and time.monotonic() > end:
                break
            first = turn % len(runners)
            for runner in runners[first:] + runners[:first]:
                runner.timed_step()
                runner.clear()


def _start(provider: Provider, workload: Workload, reference: _Results | None) -> _Runner:
    """Prepare, compile, check against the reference if there is one, take the peak of memory."""
    device = workload.settings.device
    model, function = provider.prepare(workload)
    runner = _Runner(provider, workload, model, function, {})
    empty = fresh_cache() if reference is not None else contextlib.nullcontext()
    with provider.active(), empty, codegen.recording() as code:
        if workload.settings.dynamic:
            torch._dynamo.mark_dynamic(workload.inputs[0], 0)
        start = time.perf_counter()
        runner.step()
        runner.values["first_step_s"] = round(time.perf_counter() - start, 3)
        runner.clear()
    if provider.compiled:
        runner.values |= dataclasses.asdict(code)
    if reference is not None:
        runner.values |= _errors(runner, reference)
    runner.clear()
    memory.release()
    runner.values["resident_bytes"] = memory.resident_bytes(model, workload.inputs)
    runner.values["peak_bytes"] = memory.peak_bytes(runner.step, device)
    runner.clear()
    return runner


@dataclasses.dataclass
class _Results:
    outputs: list[Tensor]
    gradients: dict[str, Tensor]


def _results(workload: Workload, model: nn.Module, function: Callable[..., Any]) -> _Results:
    workload.clear_gradients(model)
    outputs = workload.forward(function)
    if workload.protocol.trains:
        workload.backward(outputs)
    named = {**dict(model.named_parameters()), "input": workload.inputs[0]}
    gradients = {n: t.grad.detach().clone() for n, t in named.items() if t.grad is not None}
    workload.clear_gradients(model)
    return _Results([o.detach().clone() for o in outputs], gradients)


def _errors(runner: _Runner, reference: _Results) -> dict[str, float]:
    """Largest difference from eager eval mode, relative to each tensor's largest element.

    Deploy mode trains other parameters, so only gradients of the same name and shape count,
    and not those of merged layers.
    """
    results = _results(runner.workload, runner.model, runner.function)
    values = {"output_error": _worst(zip(results.outputs, reference.outputs, strict=True))}
    if runner.provider.transform is None and reference.gradients:
        values["gradient_error"] = _worst(
            (results.gradients[n], g) for n, g in reference.gradients.items()
        )
    return values


def _worst(pairs: Iterator[tuple[Tensor, Tensor]] | zip[tuple[Tensor, Tensor]]) -> float:
    worst = 0.0
    for value, expected in pairs:
        scale = expected.abs().max().item() or 1.0
        error = (value.double() - expected.double()).abs().max().item() / scale
        if math.isnan(error):
            return error
        worst = max(worst, error)
    return float(f"{worst:.3g}")
