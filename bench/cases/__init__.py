"""The networks that are benchmarked, by name."""

from __future__ import annotations

import fnmatch

from . import classification, dense, detection, own
from .base import Case

__all__ = ["CASES", "Case", "select"]

CASES: dict[str, Case] = {
    case.name: case for module in (classification, own, dense, detection) for case in module.CASES
}


def select(patterns: list[str]) -> list[Case]:
    """Cases whose name matches one of the shell-style ``patterns``, in the order of ``CASES``.

    Raises:
        ValueError: a pattern matches nothing.
    """
    for pattern in patterns:
        if not fnmatch.filter(CASES, pattern):
            raise ValueError(f"no case is called {pattern!r}; there are: {', '.join(CASES)}")
    return [c for c in CASES.values() if any(fnmatch.fnmatch(c.name, p) for p in patterns)]
