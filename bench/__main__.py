"""Command line of the benchmarks: ``python -m bench run``, ``report``, ``gpu``, ``list``."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    track,
)
from rich.table import Table

from . import cases, protocols, providers, readers, selective, suites, workload
from .metrics.measure import Budget
from .reporting.report import write_report
from .results import ResultFile, Row, read
from .runner import METRICS, Job
from .runner import run as run_jobs

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
console = Console(highlight=False)

_RESULTS = Path(__file__).parent / "results"


def _choice(value: str, known: object, option: str) -> str:
    if value not in known:  # type: ignore[operator]
        raise typer.BadParameter(f"{value!r}; one of {', '.join(known)}", param_hint=option)  # type: ignore[arg-type]
    return value


@app.command()
def run(
    suite: Annotated[str, typer.Option(help=f"One of {', '.join(suites.SUITES)}.")] = "quick",
    case: Annotated[
        list[str] | None, typer.Option(help="Cases instead of a suite; patterns such as 'r50_*'.")
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(METRICS)}; default: all of a suite.")
    ] = None,
    provider: Annotated[list[str] | None, typer.Option(help="Only these providers.")] = None,
    protocol: Annotated[str, typer.Option(help="With --case.")] = "all",
    precision: Annotated[str, typer.Option(help="With --case.")] = "float32",
    channels_last: Annotated[bool, typer.Option(help="With --case.")] = False,
    dynamic: Annotated[bool, typer.Option(help="With --case: dynamic batch size.")] = False,
    batch: Annotated[int | None, typer.Option(help="With --case.")] = None,
    real_size: Annotated[
        bool, typer.Option(help="With --case: measure at the real size on CPU, too.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rounds: Annotated[int, typer.Option(help="Timed steps per provider.")] = 20,
    seconds: Annotated[float, typer.Option(help="Timing ends after so long, per job.")] = 60,
    minutes: Annotated[float, typer.Option(help="The whole run ends after about so long.")] = 1e9,
    threads: Annotated[int | None, typer.Option(help="Threads of PyTorch on CPU.")] = None,
    output: Annotated[Path | None, typer.Option(help="Result file; resumed if there.")] = None,
) -> None:
    """Run a suite, or the cases that are named, into a result file."""
    _choice(suite, suites.SUITES, "--suite")
    metrics = [_choice(m, METRICS, "--metric") for m in metric or []]
    names = [_choice(p, providers.PROVIDERS, "--provider") for p in provider or []]
    if case:
        try:
            selected = cases.select(case)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--case") from None
        fields: dict[str, object] = {
            "protocol": _choice(protocol, protocols.PROTOCOLS, "--protocol"),
            "precision": _choice(precision, workload.PRECISIONS, "--precision"),
            "memory_format": "channels_last" if channels_last else "contiguous",
            "dynamic": dynamic,
            "device": device,
        }
        if batch is not None:
            fields["batch"] = batch
        small = device == "cpu" and not real_size
        jobs = suites.custom(selected, metrics or ["saved", "measure"], names, small, **fields)
    else:
        jobs = suites.SUITES[suite](device)
        jobs = [j for j in jobs if not metrics or j.metric in metrics]
        if names:
            chosen = [(j, tuple(p for p in j.providers if p in names)) for j in jobs]
            jobs = [Job(j.metric, j.settings, p, j.cap_bytes) for j, p in chosen if p]
    if threads is not None:
        torch.set_num_threads(threads)
    budget = Budget(rounds, seconds, time.monotonic() + 60 * minutes)
    path = output or _RESULTS / f"{'custom' if case else suite}-{device}.jsonl"
    _execute(jobs, path, budget, {"suite": None if case else suite, "rounds": rounds})


@app.command()
def gpu(
    forward: Annotated[
        bool, typer.Option("--forward", help="Forward folding instead of tune mode.")
    ] = False,
    minutes: Annotated[float, typer.Option(help="Ends after about so long.")] = 9,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only compile everything, for a pretended GPU.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Result file; resumed if there.")] = None,
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
    budget = Budget(rounds=30, seconds=20, deadline=time.monotonic() + 60 * minutes - 20)
    path = output or _RESULTS / f"{suite}-cuda.jsonl"
    _execute(jobs, path, budget, {"suite": suite, "minutes": minutes})


@app.command("cuda-codegen")
def cuda_codegen(
    case: Annotated[
        list[str] | None, typer.Option(help="Cases instead of the suite; patterns as 'r50_*'.")
    ] = None,
    provider: Annotated[list[str] | None, typer.Option(help="With --case.")] = None,
    protocol: Annotated[list[str] | None, typer.Option(help="With --case; default: all.")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="With --case.")] = None,
    batch: Annotated[int | None, typer.Option(help="With --case.")] = None,
    contiguous: Annotated[bool, typer.Option(help="With --case: not channels-last.")] = False,
    output: Annotated[Path | None, typer.Option(help="Result file; resumed if there.")] = None,
) -> None:
    """What is generated for CUDA: launches, traffic, memory. Needs a CUDA build, and no GPU."""
    jobs = suites.cuda_codegen()
    if case:
        fields: dict[str, object] = {} if batch is None else {"batch": batch}
        fields |= {"memory_format": "contiguous"} if contiguous else {}
        names = tuple(_choice(p, providers.PROVIDERS, "--provider") for p in provider or [])
        jobs = [
            Job(
                "cuda-codegen", suites.cuda_settings(c, how, dtype, **fields), names or suites.SAVED
            )
            for c in cases.select(case)
            for how in protocol or ["all"]
            for dtype in precision or ["float32"]
        ]
    path = output or _RESULTS / ("custom-codegen.jsonl" if case else "cuda-codegen.jsonl")
    _execute(jobs, path, Budget(), {"suite": None if case else "cuda-codegen"})


@app.command("readers")
def list_readers(
    case: Annotated[
        list[str] | None, typer.Option(help="Cases instead of the paper suite's; patterns.")
    ] = None,
    protocol: Annotated[str, typer.Option(help="With --case.")] = "all",
    output: Annotated[Path, typer.Option(help="Markdown file.")] = _RESULTS / "readers.md",
) -> None:
    """List what backward reads the saved tensors with, in eval mode and in ours."""
    if case:
        _choice(protocol, protocols.PROTOCOLS, "--protocol")
        settings = [suites.settings_of(c, protocol=protocol) for c in cases.select(case)]
    else:
        settings = [
            j.settings for j in suites.SUITES["paper"]("cpu") if j.providers == suites.SAVED
        ]
    output.write_text(readers.report(settings, on_case=console.print), encoding="utf-8")
    console.print(f"wrote {output}")


@app.command("selective")
def measure_selective(
    network: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(selective.NETWORKS)}; default: all.")
    ] = None,
    output: Annotated[Path, typer.Option(help="JSON file.")] = _RESULTS / "selective.json",
) -> None:
    """Bytes saved where all, the input, convolutions or norms have a gradient; eager, too."""
    names = [_choice(n, selective.NETWORKS, "--network") for n in network or selective.NETWORKS]
    rows: list[dict[str, object]] = []
    for name in track(names, "networks", console=console):
        rows += selective.measure(name)
    output.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    console.print(selective.table(rows), soft_wrap=True)
    console.print(f"wrote {output}")


@app.command()
def report(
    files: Annotated[list[Path] | None, typer.Argument(help="Default: all in results/.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for report.md and the plots.")] = _RESULTS,
) -> None:
    """Make Markdown tables and plots of result files."""
    found = files or sorted(_RESULTS.glob("*.jsonl"))
    if not found:
        raise typer.BadParameter(f"no result files in {_RESULTS}")
    for path in write_report(found, output):
        console.print(f"wrote {path}")


@app.command("list")
def list_all() -> None:
    """List cases, providers and protocols."""
    table = Table("case", "family", "real size", "precision", "note")
    for c in cases.CASES.values():
        size = "x".join(str(n) for n in (c.batch, *c.shape))
        table.add_row(c.name, c.family, size, c.precision, c.note)
    console.print(table)
    for title, items in (("providers", providers.PROVIDERS), ("protocols", protocols.PROTOCOLS)):
        table = Table(title, "")
        for item in items.values():
            table.add_row(item.name, item.title)
        console.print(table)


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


if __name__ == "__main__":
    app()
