"""What the commands share: the console, the folder of the results, options."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .. import cases

__all__ = ["RESULTS", "Batch", "Cases", "Markdown", "Output", "console", "one_of"]

RESULTS = Path(__file__).parents[1] / "results"
console = Console(highlight=False)


def one_of(known: Iterable[str], what: str = "") -> Any:
    """An option whose values are among ``known``; ``what`` begins its help."""
    names = list(known)
    listed = " | ".join(names)

    def check(value: str | list[str] | None) -> str | list[str]:
        for name in [value] if isinstance(value, str) else value or []:
            if name not in names:
                raise typer.BadParameter(f"{name!r} is not one of {listed}")
        return value or []  # None is an error in older typers

    return typer.Option(callback=check, help=f"{what} One of {listed}.".strip())


def _check_cases(patterns: list[str] | None) -> list[str]:
    try:
        cases.select(patterns or [])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return patterns or []


Cases = Annotated[
    list[str] | None,
    typer.Option(callback=_check_cases, help="Instead of a suite; patterns such as 'r50_*'."),
]
Batch = Annotated[int | None, typer.Option(help="With --case.")]
Output = Annotated[Path | None, typer.Option(help="Result file; resumed if there.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")]
