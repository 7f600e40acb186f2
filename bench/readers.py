"""What backward reads the saved tensors with: each workload's, by the operators that read them.

A tensor that only operators read which need its shape alone, or its sign, need not be saved:
this is how the rules of ``convbn_inductor_pass.passes.wanted_gradients`` were found, and where one
looks for more.

    python -m bench readers                       # every case of the paper suite
    python -m bench readers --case resnet50 --protocol adversarial
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from convbn_inductor_pass._torch.tracing import trace
from convbn_inductor_pass.saved_tensors import Mode, SavedTensor, saved_by_graph

from .libraries import MissingLibrary
from .protocols import PROTOCOLS, NotApplicable
from .reporting.tables import markdown
from .workload import Settings, setup

__all__ = ["Group", "readers_of", "report"]


@dataclasses.dataclass(frozen=True)
class Group:
    """Tensors of one workload that the same operators read: how many, and their bytes."""

    readers: tuple[str, ...]
    kind: str
    tensors: int
    nbytes: int


def report(settings: Iterable[Settings], on_case: Callable[[str], object]) -> str:
    """A Markdown document: a table per workload, those of a missing library left out."""
    parts = [
        "# What backward reads the saved tensors with",
        f"Made by `python -m bench readers`, torch {torch.__version__}. MB saved for backward, by "
        "the operators that read them, up to views; what is below 1% of a workload is one row.",
    ]
    for each in settings:
        size = "x".join(map(str, (each.batch, *each.shape)))
        name = f"{each.case}, {PROTOCOLS[each.protocol].title}, {each.precision}, {size}"
        try:
            found = readers_of(each, ("eval", "tune"))
        except (MissingLibrary, NotApplicable) as error:
            on_case(f"{name}: {error}")
            continue
        on_case(name)
        rows = [[mode, *row] for mode, groups in found.items() for row in _rows(groups)]
        parts.append(f"## {name}\n\n{markdown(['mode', 'read by', 'kind', 'tensors', 'MB'], rows)}")
    return "\n\n".join(parts) + "\n"


def readers_of(settings: Settings, modes: Sequence[Mode]) -> dict[Mode, list[Group]]:
    """By mode: the tensors saved for backward, largest group first.

    Raises:
        MissingLibrary, NotApplicable: as :func:`bench.workload.setup`.
    """
    workload = setup(settings, fake=True)
    saved: dict[Mode, list[SavedTensor]] = {mode: [] for mode in modes}

    def on_graph(gm: fx.GraphModule, inputs: list[Any]) -> None:
        for mode in modes:
            saved[mode] += saved_by_graph(gm, inputs, mode).tensors

    with workload.region():
        trace(workload.model, workload.inputs, on_graph, dynamic=settings.dynamic)
    return {mode: _groups(tensors) for mode, tensors in saved.items()}


def _groups(tensors: Iterable[SavedTensor]) -> list[Group]:
    found: dict[tuple[tuple[str, ...], str], list[int]] = collections.defaultdict(list)
    for tensor in tensors:
        found[tensor.readers, tensor.kind].append(tensor.nbytes)
    groups = [Group(*key, len(sizes), sum(sizes)) for key, sizes in found.items()]
    return sorted(groups, key=lambda g: -g.nbytes)


def _rows(groups: list[Group]) -> list[list[str]]:
    total = sum(g.nbytes for g in groups)
    shown = [g for g in groups if g.nbytes >= total / 100]
    if rest := [g for g in groups if g not in shown]:
        counts = sum(g.tensors for g in rest), sum(g.nbytes for g in rest)
        shown.append(Group(("others",), "", *counts))
    return [
        [", ".join(map(_short, g.readers)), g.kind, str(g.tensors), f"{g.nbytes / 1e6:,.1f}"]
        for g in shown
    ]


def _short(operator: str) -> str:
    return operator.removeprefix("aten.").removeprefix("prims.").removesuffix(".default")
