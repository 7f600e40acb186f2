"""The table of the kernels that a step's time goes to."""

from __future__ import annotations

from ..providers import PROVIDERS
from ..results import Row
from .analysis import groups
from .tables import markdown

__all__ = ["slowest"]

_MOST = 10


def slowest(rows: list[Row]) -> str:
    """A line for each of the slowest kernels of each provider whose steps were profiled."""
    body = [
        [group.label(size=True), PROVIDERS[name].title, f"`{kernel}`", str(calls), f"{ms:,.3f}"]
        for group in groups(rows, "measure")
        for name, row in group.rows.items()
        for kernel, calls, ms in row.values.get("kernels", [])[:_MOST]
    ]
    return markdown(["workload", "provider", "kernel", "calls", "ms"], body)
