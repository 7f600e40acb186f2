"""Why ours keeps more than another mode in a workload, or saves little: by protocol and case.

Reports quote these; a row that none of them covers reads "not explained", and the tests fail
on one among the committed results.
"""

from __future__ import annotations

from .workload import Settings

__all__ = ["UNEXPLAINED", "why", "why_little"]

UNEXPLAINED = "not explained"


def why(settings: Settings, other: str) -> str:
    """Why ours keeps more than ``other``, or other bytes than deploy mode, in this workload."""
    by_protocol = _MORE.get((settings.protocol, other))
    return by_protocol or _MORE_IN_CASE.get((settings.case, other), UNEXPLAINED)


def why_little(settings: Settings) -> str:
    """Why ours saves next to nothing of eval mode's bytes in this workload."""
    by_protocol = _LITTLE.get(settings.protocol)
    return by_protocol or _LITTLE_IN_CASE.get(settings.case, UNEXPLAINED)


_MORE: dict[tuple[str, str], str] = {}

_MORE_IN_CASE: dict[tuple[str, str], str] = {}

_LITTLE: dict[str, str] = {}

_LITTLE_IN_CASE: dict[str, str] = {}
