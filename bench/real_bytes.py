"""What autograd is really given to save, beside what ``explain`` says: under Inductor, compiled.

    python -m bench real-bytes

``explain`` reads bytes off traced graphs. Here the network is compiled and run, and saved-tensor
hooks see what its forward hands to autograd: each storage once, without parameters, buffers and
inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from convbn_inductor_pass import explain, testing

from .cases import CASES
from .eager_coverage import saved_bytes
from .protocols import PROTOCOLS, NotApplicable
from .reporting.tables import markdown
from .workload import Settings, setup

__all__ = ["Comparison", "compare", "report"]

_HEADER = ["case", "protocol", "memory format", "mode", "explain", "given to save", "difference"]
_FORMATS = ("contiguous", "channels_last")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Bytes of one workload in one mode ("eval", "tune"), as explained and as given to autograd."""

    settings: Settings
    mode: str
    explained: int
    given: int

    @property
    def difference(self) -> float:
        """Of ``given`` from ``explained``, relative to that."""
        return self.given / self.explained - 1 if self.explained else float(self.given > 0)

    def row(self) -> list[str]:
        s = self.settings
        names = [s.case, s.protocol, s.memory_format, self.mode]
        return [*names, f"{self.explained:,}", f"{self.given:,}", f"{self.difference:+.2%}"]


def compare(case: str, batch: int, shape: tuple[int, ...]) -> Iterator[Comparison]:
    """Both figures in every protocol of the case and both memory formats, with and without us.

    Raises:
        MissingLibrary: the case's library is not installed.
    """
    for protocol in (p.name for p in PROTOCOLS.values() if p.trains):
        for memory_format in _FORMATS:
            settings = Settings(CASES[case].name, batch, shape, protocol, "float32", memory_format)
            try:
                workload = setup(settings)
            except NotApplicable:
                continue
            explained = explain(workload.model, *workload.inputs).saved_bytes
            for mode in ("eval", "tune"):
                with testing.fresh_compile(flag=mode == "tune"):
                    compiled: Any = torch.compile(workload.model)
                    given = saved_bytes(compiled, *workload.inputs)
                yield Comparison(settings, mode, explained[mode], given)


def report(rows: list[list[str]], size: str) -> str:
    """A Markdown document with the rows of comparisons at ``size``."""
    parts = [
        "# What autograd is given to save, and what explain says",
        f"Made by `python -m bench real-bytes`, torch {torch.__version__}. Bytes at {size}, under "
        "Inductor, once per storage, without parameters, buffers and inputs.",
        markdown(_HEADER, rows),
    ]
    return "\n\n".join(parts) + "\n"
