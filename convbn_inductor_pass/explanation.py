"""``explain``: what the passes do to a model, and what that saves, without compiling it."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from torch import fx

from ._torch import tracing
from .codes import Code
from .config import get_options
from .passes.forward_folding import make_records as make_forward_records
from .passes.scale_gradient.records import NamedRecord
from .records import Kind, Record
from .saved_tensors import Mode, SavedForBackward, saved_by_graph

__all__ = ["Explanation", "explain"]

_MODES: tuple[Mode, ...] = ("eval", "tune", "deploy")


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Decisions about a model's batch norms, other scales and layers; bytes saved for backward.

    Attributes:
        records: one per decision, in the order of execution; see ``Record.kind``.
        saved: by mode ("eval", "tune", "deploy"), the new tensors saved for backward.
        graphs: number of graphs that Dynamo made; more than one means graph breaks.

    ``str(explanation)`` is a table for people, :meth:`to_dict` is for programs.
    """

    records: tuple[Record, ...]
    saved: dict[str, SavedForBackward]
    graphs: int

    @property
    def batch_norms(self) -> tuple[Record, ...]:
        """The records of batch norms, one per call."""
        return tuple(r for r in self.records if r.kind == "batch norm")

    @property
    def fused(self) -> int:
        """Number of batch norm calls in tune mode."""
        return sum(r.code.rewritten for r in self.batch_norms)

    @property
    def saved_bytes(self) -> dict[str, int]:
        """Bytes saved for backward beside parameters, buffers and inputs, by mode."""
        return {mode: s.new_bytes + s.copied_bytes for mode, s in self.saved.items()}

    def left(self, *, except_codes: tuple[Code, ...] = ()) -> tuple[Record, ...]:
        """Batch norms left as written, less those left for one of ``except_codes``."""
        left = (r for r in self.batch_norms if not r.code.rewritten)
        return tuple(r for r in left if r.code not in except_codes)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        return {
            "fused": self.fused,
            "batch_norms": len(self.batch_norms),
            "graphs": self.graphs,
            "saved_bytes": self.saved_bytes,
            "saved_tensors": {
                mode: [dataclasses.asdict(t) for t in s.tensors] for mode, s in self.saved.items()
            },
            "records": [r.to_dict() for r in self.records],
        }

    def __str__(self) -> str:
        text = io.StringIO()
        console = Console(file=text, width=120)
        for kind, title, columns in _TABLES:
            found = [r for r in self.records if r.kind in kind]
            if found:
                console.print(_table(title, columns, found))
        console.print(self._summary())
        return text.getvalue()

    def _summary(self) -> str:
        if not self.graphs:
            return "Dynamo made no graph: there is nothing that torch.compile would compile."
        if not self.records:
            return "There is no batch norm in what torch.compile sees of this model."
        norms = f"{self.fused} of {len(self.batch_norms)} batch norms in tune mode"
        lines = [f"{norms}, {self.graphs} graph(s)."]
        codes = dict.fromkeys(r.code for r in self.left() if r.code.remedy)
        lines += [f"{code.name}: {code.remedy}" for code in codes]
        if scales := [r for r in self.records if r.kind == "scale"]:
            done = sum(r.code.rewritten for r in scales)
            lines.append(f"{done} of {len(scales)} layers' outputs not saved for other scales.")
        wanted = [r.kind for r in self.records if r.kind in _WANTED and r.code.rewritten]
        if wanted:
            counts = (f"{wanted.count(k)} x {title}" for k, title in _WANTED.items() if k in wanted)
            lines.append(f"Not saved, since no wanted gradient needs it: {', '.join(counts)}.")
        baseline = self.saved_bytes["eval"]
        for mode, size in self.saved_bytes.items():
            share = f" ({size / baseline - 1:+.1%})" if baseline and mode != "eval" else ""
            lines.append(f"saved for backward, {mode} mode: {size:,} bytes{share}")
        if copied := self.saved["tune"].copied_bytes:
            lines.append(
                f"{copied:,} bytes of that are channels-last copies of weights and inputs, which "
                "Inductor makes and saves; model.to(memory_format=torch.channels_last), and the "
                "inputs likewise, saves them."
            )
        return "\n".join(lines)


def _decision(r: Record) -> str:
    why = f" ({r.detail})" if r.detail else ""
    if r.code.rewritten:
        return f"{r.code.name}{f' ({r.kernel})' if r.kernel else ''}{why}"
    return f"{r.code.name}: {r.code.value}{why}"


def _size(size: int) -> str:
    return decimal(size) if size >= 0 else f"-{decimal(-size)}"


_Column = tuple[str, Callable[[Record], str]]
_LAYER: _Column = ("layer", lambda r: r.layer)
_DECISION: _Column = ("decision", _decision)
_SHAPE: _Column = ("layer's output", lambda r: "x".join(map(str, r.output_shape)))
_BYTES: _Column = ("bytes", lambda r: _size(r.output_bytes) if r.output_bytes else "")
_SAVED: _Column = (
    "bytes less",
    lambda r: _size(r.bytes_saved) if r.code.rewritten else "",
)
_WANTED: dict[Kind, str] = {
    "shape": "read for its shape",
    "activation": "activation's mask",
    "pooling": "mask before pooling",
    "mask": "mask as bits",
}
_TABLES: tuple[tuple[Sequence[str], str, tuple[_Column, ...]], ...] = (
    (
        ["batch norm"],
        "Batch norms and the layers before them",
        (_LAYER, ("batch norm", lambda r: r.batch_norm), _SHAPE, _BYTES, _SAVED, _DECISION),
    ),
    (
        ["scale"],
        "Other trained scales, by the layers before them",
        (_LAYER, _SHAPE, _BYTES, _SAVED, _DECISION),
    ),
    (
        [*_WANTED],
        "Wanted gradients: tensors that backward can do without",
        (
            ("tensor of", lambda r: r.layer),
            ("rule", lambda r: _WANTED[r.kind]),
            ("tensor", lambda r: "x".join(map(str, r.output_shape))),
            _SAVED,
            _DECISION,
        ),
    ),
    (
        ["layer"],
        "Forward folding: layers and their epilogues",
        (
            _LAYER,
            ("epilogue", lambda r: r.epilogue),
            ("bytes as written", lambda r: decimal(r.bytes_exact)),
            ("bytes folded", lambda r: decimal(r.bytes_folded)),
            _DECISION,
        ),
    ),
)


def _table(title: str, columns: tuple[_Column, ...], records: list[Record]) -> Table:
    table = Table(title=title, title_justify="left")
    for name, _ in columns:
        is_number = name.startswith("bytes")
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for r in records:
        table.add_row(*(cell(r) for _, cell in columns))
    return table


def explain(
    model: Callable[..., Any], *example_inputs: Any, dynamic: bool | None = None
) -> Explanation:
    """Say what the passes do to ``torch.compile(model)`` and what that saves.

    The flag need not be set and nothing is compiled or run: the model is traced on fake
    tensors, so that inputs may be made under ``FakeTensorMode`` for batches that do not fit
    this machine. Compile caches are neither read nor written.

    Args:
        model: a module or function, in the mode (eval, requires_grad) that it is to be used in.
        example_inputs: its inputs; tensors may be real or fake, other values are passed on.
        dynamic: as in ``torch.compile``.

    Example::

        model = torchvision.models.resnet50().eval()
        with torch._subclasses.FakeTensorMode():
            batch = torch.empty(64, 3, 224, 224)
        print(convbn_inductor_pass.explain(model, batch))
    """
    records: list[Record] = []
    total = {mode: SavedForBackward(()) for mode in _MODES}
    graphs = 0
    options = get_options()

    def on_graph(gm: fx.GraphModule, inputs: list[Any]) -> None:
        nonlocal graphs
        found: list[NamedRecord] = []
        forward: list[Record] = []

        def on_forward(graph: fx.Graph) -> None:
            if options.forward != "exact":
                forward.extend(make_forward_records(graph, options))

        wanted: list[Record] = []
        # What batch norms and other scales save by themselves.
        of_scales = saved_by_graph(gm, inputs, "tune", on_records=found.extend, wanted=None)
        saved = {
            "eval": saved_by_graph(gm, inputs, "eval"),
            "tune": saved_by_graph(gm, inputs, "tune", on_forward, wanted=wanted.extend),
            "deploy": saved_by_graph(gm, inputs, "deploy"),
        }
        # Only now, because Dynamo may give up on a graph above and trace again (dynamic floats).
        graphs += 1
        records.extend(_with_bytes(found, saved["eval"], of_scales))
        records.extend(wanted)
        records.extend(forward)
        for mode in _MODES:
            total[mode] = total[mode] + saved[mode]

    tracing.trace(model, example_inputs, on_graph, dynamic=dynamic)
    return Explanation(tuple(records), {str(m): s for m, s in total.items()}, graphs)


def _with_bytes(
    found: list[NamedRecord], before: SavedForBackward, after: SavedForBackward
) -> list[Record]:
    """The records with the bytes that the partitioner really saves less after each layer."""
    return [
        dataclasses.replace(record, bytes_saved=before.bytes_after(name) - after.bytes_after(name))
        if name and record.code.rewritten
        else record
        for name, record in found
    ]
