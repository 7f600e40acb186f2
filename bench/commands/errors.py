"""Commands that measure errors against float64: ``gradient-error``, ``forward-error``."""

from __future__ import annotations

import statistics
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from .. import forward_error, gradient_error
from ..libraries import MissingLibrary
from ..reporting import tables
from .options import Markdown, one_of

__all__ = ["measure_forward", "measure_gradients"]


def measure_gradients(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, one_of(["float32", "bfloat16", "float16"])] = "float32",
    backend: Annotated[str, one_of(gradient_error.BACKENDS)] = "fast",
    seeds: Annotated[int, typer.Option(help="Medians are over so many runs.")] = 5,
) -> None:
    """Error of every gradient against float64, eval mode's and tune mode's, layer by layer."""
    table = Table(title=f"{dtype} on {device}, torch {torch.__version__}: eval / tune")
    for column in ("layer", "mean / deviation", *gradient_error.NAMES):
        table.add_column(column)
    for name, shape in gradient_error.LAYERS.items():
        modes = gradient_error.compiled(backend)
        for ratio in gradient_error.RATIOS:
            runs = [
                gradient_error.errors(modes, shape, ratio, seed, device, getattr(torch, dtype))
                for seed in range(seeds)
            ]
            cells = [
                " / ".join(
                    f"{statistics.median(run[mode][i] for run in runs):.1e}" for mode in modes
                )
                for i in range(len(gradient_error.NAMES))
            ]
            table.add_row(name, f"{ratio:g}", *cells)
    Console(width=120).print(table)


def measure_forward(
    seeds: Annotated[int, typer.Option(help="Means are over so many draws.")] = 20,
    offset: Annotated[float, typer.Option(help="Mean of the input; its deviation is 1.")] = 0,
    forward: Annotated[str, one_of(["fold", "auto"])] = "fold",
    case: Annotated[list[str] | None, one_of(forward_error.CASES, "Default: all.")] = None,
    precision: Annotated[
        list[str] | None, one_of(forward_error.PRECISIONS, "Default: all.")
    ] = None,
    markdown: Markdown = False,
) -> None:
    """Errors of the folded forward beside eval mode's own, against float64."""
    progress = Console(stderr=True)
    rows = []
    for name in case or forward_error.CASES:
        for dtype in precision or forward_error.PRECISIONS:
            try:
                e = forward_error.measure(name, dtype, seeds, offset, forward=forward)
            except MissingLibrary as error:
                progress.print(f"{name}: {error}")
                continue
            means = (statistics.fmean(each) for each in (e.exact, e.folded))
            extremes = f"{min(e.ratios):.2f} to {max(e.ratios):.2f}"
            rows.append([name, dtype, *(f"{m:.1e}" for m in means), f"{e.ratio:.2f}", extremes])
            progress.print(*rows[-1])
    tables.show(forward_error.HEADER, rows, as_markdown=markdown, width=120)
