"""The story of the pass: find, decide, rewrite, and tell what was decided."""

from __future__ import annotations

from torch import fx

from .config import Options
from .decide import Decision, decide
from .effects import Effects
from .find import find_candidates
from .rewrite import rewrite

__all__ = ["analyze", "apply"]


def analyze(graph: fx.Graph, options: Options) -> list[Decision]:
    """Decide about every batch norm of ``graph``; changes nothing."""
    candidates = list(find_candidates(graph))
    if not candidates:
        return []
    effects = Effects(graph)
    return [decide(candidate, effects, options) for candidate in candidates]


def apply(decisions: list[Decision]) -> int:
    """Rewrite the graph as decided; returns the number of pairs fused."""
    fused = [decision for decision in decisions if decision.fused]
    for decision in reversed(fused):
        rewrite(decision)
    return len(fused)
