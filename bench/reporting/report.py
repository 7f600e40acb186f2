"""One Markdown page with tables and pictures out of result files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..results import Row, read
from . import generated, kernels, plots, tables

__all__ = ["write_report"]

_INTRODUCTION = """\
# Benchmark report

Made by `python -m bench report`; the rules of measurement are in [README.md](../README.md).
MB and GB are powers of ten. "Saved for backward" counts new tensors that the compiled forward
hands to the backward; parameters, inputs and views of them are alive anyway and count nothing.
"""


def write_report(files: list[Path], folder: Path) -> list[Path]:
    """Write ``report.md`` and its pictures into ``folder``; returns what was written.

    Of results with the same settings in several files, those of the last file count.
    """
    folder.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = []
    rows: dict[Any, Row] = {}
    for path in files:
        headers, found = read(path)
        runs += [{**header, "file": path.name} for header in headers]
        rows |= {row.key: row for row in found}
    pictures = plots.draw(list(rows.values()), folder)
    page = folder / "report.md"
    page.write_text(_page(list(rows.values()), runs, pictures))
    return [page, *pictures.values()]


def _page(rows: list[Row], runs: list[dict[str, Any]], pictures: dict[str, Path]) -> str:
    parts = [_INTRODUCTION]

    def section(title: str, body: str) -> None:
        if body.count("\n") > 1 or body.startswith(("-", "!")):
            parts.append(f"## {title}\n\n{body}\n")

    section("In short", tables.overview_table(rows))
    section("Published figures beside ours", tables.published(rows))
    section("Saved for backward", tables.saved(rows))
    section("Where ours saves more bytes than another", tables.exceptions(rows))
    section("Where ours saves over nine tenths of eval mode's bytes", tables.small_gains(rows))
    section("Recomputation", tables.recomputation(rows))
    for device, name in (("cpu", "CPU"), ("cuda", "GPU")):
        if any(r.metric == "measure" and r.settings.device == device for r in rows):
            section(f"Training, {name}: geometric means", tables.totals(rows, device))
            section(f"Training, {name}", tables.measured(rows, device, trains=True))
            section(f"Inference, {name}", tables.measured(rows, device, trains=False))
        else:
            parts.append(f"## {name}\n\n{tables.NONE}\n")
    section("Slowest kernels of a step", kernels.slowest(rows))
    section("Code for a GPU, generated and not run", generated.cuda_code(rows))
    section("Largest batch under a memory cap", tables.capacities(rows))
    section("Pictures", "\n\n".join(f"![{t}]({p.name})" for t, p in pictures.items()))
    section("Skipped or failed", tables.problems(rows))
    section("Where the results come from", tables.machine(runs))
    return "\n".join(parts)
