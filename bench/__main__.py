"""Benchmarks of tune mode against eval mode, PyTorch's own pass, deploy mode and recomputation."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from . import cases, protocols, providers
from .commands import demonstration, errors, jobs, networks
from .commands.options import RESULTS, console
from .experiments import EXPERIMENTS, lab

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


def report(
    files: Annotated[list[Path] | None, typer.Argument(help="Default: all in results/.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for report.md and the plots.")] = RESULTS,
) -> None:
    """Make Markdown tables and plots of result files."""
    from .reporting.report import write_report  # matplotlib, which no other command needs

    found = files or sorted(RESULTS.glob("*.jsonl"))
    if not found:
        raise typer.BadParameter(f"no result files in {RESULTS}")
    for path in write_report(found, output):
        console.print(f"wrote {path}")


def experiment(
    name: Annotated[str, typer.Argument(help=f"One of {' | '.join(EXPERIMENTS)}.")],
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS / "experiments",
) -> None:
    """One of the paper's experiments, small; see bench/experiments/README.md."""
    if name not in EXPERIMENTS:
        raise typer.BadParameter(f"{name!r} is not one of {' | '.join(EXPERIMENTS)}")
    started = time.time()
    result, figure = EXPERIMENTS[name].run()
    lab.write(name, result, figure, output, started)


def list_all() -> None:
    """List cases, providers, protocols and experiments."""
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
    table = Table("experiments", "")
    for name, module in EXPERIMENTS.items():
        table.add_row(name, (module.__doc__ or "").splitlines()[0])
    console.print(table)


_COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demonstration.demonstrate,
    "run": jobs.run,
    "gpu": jobs.gpu,
    "cuda-codegen": jobs.cuda_codegen,
    "report": report,
    "list": list_all,
    "eager-coverage": networks.cover_eager_mode,
    "recognition": networks.count_recognised,
    "readers": networks.list_readers,
    "selective": networks.measure_selective,
    "real-bytes": networks.compare_real_bytes,
    "gradient-error": errors.measure_gradients,
    "forward-error": errors.measure_forward,
    "experiment": experiment,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)

if __name__ == "__main__":
    app()
