"""Commands that run jobs into a result file: ``run``, ``gpu``, ``cuda-codegen``."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import cases, protocols, providers, suites, workload
from ..metrics.measure import Budget
from ..results import ResultFile, Row, read
from ..runner import METRICS, Job
from ..runner import run as run_jobs
from .options import RESULTS, Batch, Cases, Output, console, one_of

__all__ = ["cuda_codegen", "gpu", "run"]


def run(
    suite: Annotated[str, one_of(suites.SUITES)] = "quick",
    case: Cases = None,
    metric: Annotated[list[str] | None, one_of(METRICS, "Default: all of a suite.")] = None,
    provider: Annotated[list[str] | None, one_of(providers.PROVIDERS, "Default: all.")] = None,
    protocol: Annotated[str, one_of(protocols.PROTOCOLS, "With --case.")] = "all",
    precision: Annotated[str, one_of(workload.PRECISIONS, "With --case.")] = "float32",
    channels_last: Annotated[bool, typer.Option(help="With --case.")] = False,
    dynamic: Annotated[bool, typer.Option(help="With --case: dynamic batch size.")] = False,
    batch: Batch = None,
    real_size: Annotated[
        bool, typer.Option(help="With --case: measure at the real size on CPU, too.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rounds: Annotated[int, typer.Option(help="Timed steps per provider.")] = 20,
    seconds: Annotated[float, typer.Option(help="Timing ends after so long, per job.")] = 60,
    minutes: Annotated[float, typer.Option(help="The whole run ends after about so long.")] = 1e9,
    threads: Annotated[int | None, typer.Option(help="Threads of PyTorch on CPU.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Note the slowest kernels.")] = False,
    output: Output = None,
) -> None:
    """Run a suite, or the cases that are named, into a result file."""
    metrics, names = metric or [], provider or []
    if case:
        fields: dict[str, object] = {
            "protocol": protocol,
            "precision": precision,
            "memory_format": "channels_last" if channels_last else "contiguous",
            "dynamic": dynamic,
            "device": device,
        }
        if batch is not None:
            fields["batch"] = batch
        small = device == "cpu" and not real_size
        jobs = suites.custom(
            cases.select(case), metrics or ["saved", "measure"], names, small, **fields
        )
    else:
        jobs = suites.SUITES[suite](device)
        jobs = [j for j in jobs if not metrics or j.metric in metrics]
        if names:
            chosen = [(j, tuple(p for p in j.providers if p in names)) for j in jobs]
            jobs = [Job(j.metric, j.settings, p, j.cap_bytes) for j, p in chosen if p]
    if threads is not None:
        torch.set_num_threads(threads)
    budget = Budget(rounds, seconds, time.monotonic() + 60 * minutes, profile)
    path = output or RESULTS / f"{'custom' if case else suite}-{device}.jsonl"
    _execute(jobs, path, budget, {"suite": None if case else suite, "rounds": rounds})


def gpu(
    forward: Annotated[
        bool, typer.Option("--forward", help="Forward folding instead of tune mode.")
    ] = False,
    minutes: Annotated[float, typer.Option(help="Ends after about so long.")] = 9,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only compile everything, for a pretended GPU.")
    ] = False,
    output: Output = None,
) -> None:
    """What is wanted from a CUDA GPU, most valuable first, in 9 minutes; then go on with more."""
    suite = "gpu-forward" if forward else "gpu"
    jobs = suites.SUITES[suite]("cuda")
    if dry_run:
        path = output or Path(tempfile.mkdtemp()) / "dry-run.jsonl"
        _execute(suites.dry_run(jobs), path, Budget(), {"suite": suite, "dry_run": True})
        raise typer.Exit(any(row.problem for row in read(path)[1]))
    if not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device here")
    budget = Budget(30, 20, time.monotonic() + 60 * minutes - 20, profile=True)
    path = output or RESULTS / f"{suite}-cuda.jsonl"
    _execute(jobs, path, budget, {"suite": suite, "minutes": minutes})


def cuda_codegen(
    case: Cases = None,
    provider: Annotated[list[str] | None, one_of(providers.PROVIDERS, "With --case.")] = None,
    protocol: Annotated[
        list[str] | None, one_of(protocols.PROTOCOLS, "With --case; default: all.")
    ] = None,
    precision: Annotated[list[str] | None, one_of(workload.PRECISIONS, "With --case.")] = None,
    batch: Batch = None,
    contiguous: Annotated[bool, typer.Option(help="With --case: not channels-last.")] = False,
    output: Output = None,
) -> None:
    """What is generated for CUDA: launches, traffic, memory. Needs a CUDA build, and no GPU."""
    jobs = suites.cuda_codegen()
    if case:
        fields: dict[str, object] = {} if batch is None else {"batch": batch}
        fields |= {"memory_format": "contiguous"} if contiguous else {}
        names = tuple(provider or suites.SAVED)
        jobs = [
            Job("cuda-codegen", suites.cuda_settings(c, how, dtype, **fields), names)
            for c in cases.select(case)
            for how in protocol or ["all"]
            for dtype in precision or ["float32"]
        ]
    path = output or RESULTS / ("custom-codegen.jsonl" if case else "cuda-codegen.jsonl")
    _execute(jobs, path, Budget(), {"suite": None if case else "cuda-codegen"})


def _execute(jobs: list[Job], path: Path, budget: Budget, arguments: dict[str, object]) -> None:
    file = ResultFile(path, arguments=arguments)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("starting", total=len(jobs))
        begun = 0

        def on_start(job: Job) -> None:
            nonlocal begun
            progress.update(bar, description=str(job), completed=begun)
            begun += 1

        def show(row: Row) -> None:
            progress.print(_line(row), soft_wrap=True)

        run_jobs(jobs, file, budget, on_start=on_start, on_row=show)
        done = begun == len(jobs)
        progress.update(bar, description="done" if done else "out of time", completed=begun)
    console.print(f"results in {path}")


def _line(row: Row) -> str:
    what = f"{row.metric:8} {row.settings.case:28} {row.settings.protocol:13} {row.provider:16}"
    if row.problem:
        return f"{what} {row.problem}"
    if row.metric == "saved":
        return f"{what} {row.values['bytes'] / 1e6:,.1f} MB saved for backward"
    if row.metric == "cuda-codegen":
        counts = [f"{row.values.get(f'{p}_kernels', 0)} {p}" for p in ("forward", "backward")]
        return f"{what} {' + '.join(counts)} kernels, peak {row.values['peak_bytes'] / 1e6:,.1f} MB"
    if row.metric == "capacity":
        return f"{what} batch {row.values['largest_batch']}"
    if "step_ms" in row.values:
        steps = sorted(row.values["step_ms"])
        return f"{what} {steps[len(steps) // 2]:.1f} ms per step"
    return f"{what} first step {row.values['first_step_s']:.1f} s"
