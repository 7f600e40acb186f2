"""Commands on networks: coverage and recognition, and what is saved for backward, in detail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from .. import (
    cases,
    eager_coverage,
    protocols,
    readers,
    real_bytes,
    recognition,
    selective,
    suites,
)
from ..libraries import MissingLibrary
from ..models.covered import NETWORKS
from ..reporting import tables
from .options import RESULTS, Cases, Markdown, console, one_of

__all__ = [
    "compare_real_bytes",
    "count_recognised",
    "cover_eager_mode",
    "list_readers",
    "measure_selective",
]

_errors = Console(stderr=True)


def cover_eager_mode(
    model: Annotated[list[str] | None, one_of(NETWORKS, "Default: all.")] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table of the committed results.")
    ] = False,
) -> None:
    """Tune mode on real networks: pairs found, bytes saved in eager mode, errors of gradients."""
    if markdown:
        print(eager_coverage.markdown(json.loads(eager_coverage.RESULTS.read_text())), end="")
        return
    table = Table(*eager_coverage.HEADER)
    results: dict[str, Any] = {"torch": torch.__version__, "networks": {}}
    for name in track(model or list(NETWORKS), "networks"):
        try:
            found = eager_coverage.measure(*NETWORKS[name])
        except MissingLibrary as error:
            _errors.print(f"{name}: {error}")
            continue
        results["networks"][name] = found
        table.add_row(*eager_coverage.row(name, found))
    Console(width=160).print(table)
    if not model:
        eager_coverage.RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def count_recognised(
    model: Annotated[list[str] | None, one_of(recognition.MODELS, "Default: all.")] = None,
    markdown: Markdown = False,
) -> None:
    """Which batch norms of real networks forward folding recognises, and which it misses."""
    rows = []
    for name in model or recognition.MODELS:
        torch.manual_seed(0)
        try:
            network = recognition.MODELS[name]().eval()
        except MissingLibrary as error:
            _errors.print(f"{name}: {error}")
            continue
        size = 224 if "levit" in name else 96
        r = recognition.recognise(network, torch.randn(2, 3, size, size))
        counts = (r.batch_norms, r.after_layer, r.folded, len(r.missed))
        rows.append([name, *map(str, counts), ", ".join(r.classes)])
        _errors.print(*rows[-1], *r.missed)
    tables.show(recognition.HEADER, rows, as_markdown=markdown, width=140)


def list_readers(
    case: Cases = None,
    protocol: Annotated[str, one_of(protocols.PROTOCOLS, "With --case.")] = "all",
    output: Annotated[Path, typer.Option(help="Markdown file.")] = RESULTS / "readers.md",
) -> None:
    """What reads the saved tensors in backward, in eval mode and ours; of the paper suite."""
    if case:
        settings = [suites.settings_of(c, protocol=protocol) for c in cases.select(case)]
    else:
        settings = [
            j.settings for j in suites.SUITES["paper"]("cpu") if j.providers == suites.SAVED
        ]
    output.write_text(readers.report(settings, on_case=console.print), encoding="utf-8")
    console.print(f"wrote {output}")


def measure_selective(
    network: Annotated[list[str] | None, one_of(selective.NETWORKS, "Default: all.")] = None,
    output: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "selective.json",
) -> None:
    """Bytes saved where all, the input, convolutions or norms have a gradient; eager, too."""
    rows: list[dict[str, object]] = []
    for name in track(network or list(selective.NETWORKS), "networks", console=console):
        rows += selective.measure(name)
    output.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    console.print(selective.table(rows), soft_wrap=True)
    console.print(f"wrote {output}")


def compare_real_bytes(
    case: Cases = None,
    batch: Annotated[int, typer.Option(help="Of each case.")] = 16,
    size: Annotated[int, typer.Option(help="Height and width of the images.")] = 64,
    output: Annotated[Path, typer.Option(help="Markdown file.")] = RESULTS / "real_bytes.md",
) -> None:
    """Bytes that a compiled network gives autograd to save, beside what explain says."""
    rows: list[list[str]] = []
    chosen = cases.select(case or ["resnet18", "mobilenet_v2"])
    if others := [c.name for c in chosen if len(c.shape) != 3 or c.shape[0] != 3]:
        raise typer.BadParameter(f"{', '.join(others)} take no images")
    for name in (c.name for c in chosen):
        for each in real_bytes.compare(name, batch, (3, size, size)):
            rows.append(each.row())
            console.print(*rows[-1])
    output.write_text(real_bytes.report(rows, f"{batch}x3x{size}x{size}"), encoding="utf-8")
    console.print(f"wrote {output}")
