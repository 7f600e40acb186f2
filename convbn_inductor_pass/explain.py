"""``explain``: what the pass does to a model, and what that saves, without compiling it."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from torch import fx

# GONE import pipeline
from . import saved_tensors
from ._torch import tracing
from .codes import Code
from .config import get_options
from .passes.forward_folding import decide
from .records import (
    ForwardRecord,
    Record,
    ScaleRecord,
    make_forward_records,
    make_records,
    make_scale_records,
)
from .saved_tensors import SavedForBackward

__all__ = ["Explanation", "explain"]

_MODES: tuple[saved.Mode, ...] = ("eval", "tune", "deploy")


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Decisions about every batch norm of a model, and bytes kept for backward.

    Attributes:
        records: one per batch norm, in the order of execution.
        saved: by mode ("eval", "tune", "deploy"), the new tensors kept for backward.
        graphs: number of graphs that Dynamo made; more than one means graph breaks.
        forward: the kernel half's decisions about layers; none with ``forward="exact"``.
        scales: decisions about layers whose output backward would sum over for the gradients of
            scales that are no batch norm to PyTorch.

    ``str(explanation)`` is a table for people, :meth:`to_dict` is for programs.
    """

    records: tuple[Record, ...]
    saved: dict[str, SavedForBackward]
    graphs: int
    forward: tuple[ForwardRecord, ...] = ()
    scales: tuple[ScaleRecord, ...] = ()

    @property
    def fused(self) -> int:
        """Number of batch norms fused with the layer before them."""
        return sum(r.code.fused for r in self.records)

    @property
    def saved_bytes(self) -> dict[str, int]:
        """New bytes kept for backward, by mode."""
        return {mode: tensors.new_bytes for mode, tensors in self.saved.items()}

    def left(self, *, except_codes: tuple[Code, ...] = ()) -> tuple[Record, ...]:
        """Batch norms that are not fused, less those left alone for one of ``except_codes``."""
        return tuple(r for r in self.records if not r.code.fused and r.code not in except_codes)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        return {
            "fused": self.fused,
            "batch_norms": len(self.records),
            "graphs": self.graphs,
            "saved_bytes": self.saved_bytes,
            "saved_tensors": {
                mode: [dataclasses.asdict(t) for t in s.tensors] for mode, s in self.saved.items()
            },
            "records": [r.to_dict() for r in self.records],
            "forward": [r.to_dict() for r in self.forward],
            "scales": [r.to_dict() for r in self.scales],
        }

    def __str__(self) -> str:
        text = io.StringIO()
        console = Console(file=text, width=120)
        if self.records:
            console.print(self._table())
        if self.forward:
            console.print(self._forward_table())
        if self.scales:
            console.print(self._scales_table())
        console.print(self._summary())
        return text.getvalue()

    def _table(self) -> Table:
        table = Table(title="Batch norms and the layers before them", title_justify="left")
        for column in ("layer", "batch norm", "layer's output", "bytes", "decision"):
            is_number = column == "bytes"
            table.add_column(column, justify="right" if is_number else "left", overflow="fold")
        for r in self.records:
            why = f" ({r.detail})" if r.detail else ""
            table.add_row(
                r.layer,
                r.batch_norm,
                "x".join(str(s) for s in r.output_shape),
                decimal(r.output_bytes) if r.output_bytes else "",
                r.code.name if r.code.fused else f"{r.code.name}: {r.code.value}{why}",
            )
        return table

    def _forward_table(self) -> Table:
        table = Table(title="Forward: layers and what follows them", title_justify="left")
        for column in (
            *("layer", "computes also", "bytes as written", "bytes folded"),
            *("ms as written", "ms fastest other", "decision"),
        ):
            is_number = column.startswith(("bytes", "ms"))
            table.add_column(column, justify="right" if is_number else "left", overflow="fold")
        for r in self.forward:
            times = (r.seconds_exact, r.seconds_folded)
            code, why = r.code, f" ({r.detail})" if r.detail else ""
            table.add_row(
                r.layer,
                r.epilogue,
                decimal(r.bytes_exact),
                decimal(r.bytes_folded),
                *("" if t is None else f"{t * 1e3:.3g}" for t in times),
                f"{code.name} ({r.kernel}){why}"
                if code.rewritten
                else f"{code.name}: {code.value}{why}",
            )
        return table

    def _scales_table(self) -> Table:
        table = Table(title="Other trained scales, by the layers before them", title_justify="left")
        for column in ("layer", "layer's output", "bytes", "decision"):
            is_number = column == "bytes"
            table.add_column(column, justify="right" if is_number else "left", overflow="fold")
        for r in self.scales:
            why = f" ({r.detail})" if r.detail else ""
            table.add_row(
                r.layer,
                "x".join(str(s) for s in r.output_shape),
                decimal(r.output_bytes),
                r.code.name if r.code.rewritten else f"{r.code.name}: {r.code.value}{why}",
            )
        return table

    def _summary(self) -> str:
        if not self.graphs:
            return "Dynamo made no graph: there is nothing that torch.compile would compile."
        if not (self.records or self.scales or self.forward):
            return "There is no batch norm in what torch.compile sees of this model."
        lines = [f"{self.fused} of {len(self.records)} batch norms fused, {self.graphs} graph(s)."]
        if self.scales:
            done = sum(r.code.rewritten for r in self.scales)
            lines.append(f"{done} of {len(self.scales)} layers no longer kept for other scales.")
        baseline = self.saved_bytes["eval"]
        for mode, size in self.saved_bytes.items():
            share = f" ({size / baseline - 1:+.1%})" if baseline and mode != "eval" else ""
            lines.append(f"kept for backward, {mode} mode: {size:,} bytes{share}")
        return "\n".join(lines)


def explain(
    model: Callable[..., Any], *example_inputs: Any, dynamic: bool | None = None
) -> Explanation:
    """Say what the pass does to ``torch.compile(model)`` and what that saves.

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
    forward_records: list[ForwardRecord] = []
    scale_records: list[ScaleRecord] = []
    options = get_options()

    def on_graph(gm: fx.GraphModule, inputs: list[Any]) -> None:
        nonlocal graphs
        found: list[Record] = []
        for module in tracing.graph_modules(gm):
            decisions = pipeline.analyze(module.graph, options)
            found.extend(make_records(decisions).records)
        found_forward: list[ForwardRecord] = []

        def on_forward(graph: fx.Graph) -> None:
            if options.forward != "exact":
                found_forward.extend(make_forward_records(forward.analyze(graph, options)))

        found_scales: list[ScaleRecord] = []
        kept = {
            mode: saved.saved_by_graph(
                gm,
                inputs,
                mode,
                on_forward if mode == "tune" else lambda graph: None,
                lambda decisions: found_scales.extend(make_scale_records(decisions)),
            )
            for mode in _MODES
        }
        # Only now, because Dynamo may give up on a graph above and trace anew (dynamic floats).
        graphs += 1
        records.extend(found)
        forward_records.extend(found_forward)
        scale_records.extend(found_scales)
        for mode in _MODES:
            total[mode] = total[mode] + kept[mode]

    tracing.trace(model, example_inputs, on_graph, dynamic=dynamic)
    by_mode = {str(mode): kept for mode, kept in total.items()}
    return Explanation(
        tuple(records), by_mode, graphs, tuple(forward_records), tuple(scale_records)
    )
