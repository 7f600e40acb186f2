"""An explanation as text, and as a picture."""

import collections
import io
import pathlib
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from .records import Kind, Record

if TYPE_CHECKING:
    from .explanation import Explanation


def as_text(explanation: "Explanation") -> str:
    """Tables of the decisions, and the bytes of each mode."""
    text = io.StringIO()
    console = Console(file=text, width=120, markup=False)
    for title, (kinds, columns) in _TABLES.items():
        found = [r for r in explanation.records if r.kind in kinds]
        table = Table(title=title, title_justify="left")
        for name in columns:
            is_number = name.startswith("bytes")
            table.add_column(name, justify="right" if is_number else "left", overflow="fold")
        for r in found:
            table.add_row(*(_CELLS[name](r) for name in columns))
        if found:
            console.print(table)
    console.print(_summary(explanation))
    return text.getvalue()


def save_picture(explanation: "Explanation", path: str | pathlib.Path) -> None:
    """Draw megabytes saved for backward by part of the model, in each mode.

    A part is a top-level module or, if there is only one, a module below it. "(copies)" are the
    channels-last copies of weights and inputs that Inductor makes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    modules = [t.module.split(".") for s in explanation.saved.values() for t in s.tensors]
    depth = 1 if len({m[0] for m in modules}) > 1 else 2
    sizes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for mode, saved in explanation.saved.items():
        for tensor in saved.tensors:
            sizes[".".join(tensor.module.split(".")[:depth]) or "(model)"][mode] += tensor.nbytes
    for mode, saved in explanation.saved.items():
        if saved.copied_bytes:
            sizes["(copies)"][mode] = saved.copied_bytes
    figure = Figure(figsize=(8, 1.4 + 0.5 * len(sizes)), layout="constrained")
    axes = figure.subplots()
    colours = {"eval": "#999999", "tune": "#0072B2", "deploy": "#009E73"}
    for i, mode in enumerate(explanation.saved):
        heights = [size[mode] / 1e6 for size in sizes.values()]
        label = f"{mode} mode: {explanation.saved_bytes[mode] / 1e6:,.1f} MB"
        places = [y + 0.27 * (i - 1) for y in range(len(sizes))]
        axes.barh(places, heights, 0.25, label=label, color=colours[mode])
    axes.set_yticks(range(len(sizes)), [*sizes])
    axes.invert_yaxis()
    axes.set_xlabel("MB saved for backward")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _summary(explanation: "Explanation") -> str:
    if not explanation.graphs:
        return "Dynamo captured no graph: there is nothing for torch.compile to compile."
    if not explanation.records:
        return "There is no batch norm in the graphs that torch.compile sees."
    norms = f"{explanation.fused} of {len(explanation.batch_norms)} batch norms in tune mode"
    lines = [f"{norms}, {explanation.graphs} graph(s)."]
    codes = dict.fromkeys(r.code for r in explanation.left() if r.code.remedy)
    lines += [f"{code.name}: {code.remedy}" for code in codes]
    if scales := [r for r in explanation.records if r.kind == "scale"]:
        done = sum(r.code.rewritten for r in scales)
        lines.append(f"{done} of {len(scales)} layers with other scales: output not saved.")
    wanted = [r.kind for r in explanation.records if r.kind in _WANTED and r.code.rewritten]
    if wanted:
        counts = (f"{wanted.count(k)} x {title}" for k, title in _WANTED.items() if k in wanted)
        lines.append(f"Not saved, since no wanted gradient needs it: {', '.join(counts)}.")
    saved, peaks = explanation.saved_bytes, explanation.peak_bytes
    for title, sizes in (("saved for backward", saved), ("estimated peak of a step", peaks)):
        for mode, size in sizes.items():
            compared = sizes["eval"] and mode != "eval"
            share = f" ({size / sizes['eval'] - 1:+.1%})" if compared else ""
            lines.append(f"{title}, {mode} mode: {size:,} bytes{share}")
    if copied := explanation.saved["tune"].copied_bytes:
        lines.append(
            f"{copied:,} of tune mode's bytes are channels-last copies of weights and inputs that "
            "Inductor makes; to avoid them, make the model and its inputs channels-last: "
            "model.to(memory_format=torch.channels_last)."
        )
    return "\n".join(lines)


def _decision(r: Record) -> str:
    why = f" ({r.detail})" if r.detail else ""
    if r.code.rewritten:
        return f"{r.code.name}{f' ({r.kernel})' if r.kernel else ''}{why}"
    return f"{r.code.name}: {r.code.value}{why}"


def _shape(r: Record) -> str:
    """The shape, with a question mark for a size that is computed from others."""
    known = (isinstance(s, int) or s.isidentifier() for s in r.output_shape)
    return "x".join(str(s) if k else "?" for s, k in zip(r.output_shape, known, strict=True))


def _size(size: int) -> str:
    return decimal(size) if size >= 0 else f"-{decimal(-size)}"


_CELLS: dict[str, Callable[[Record], str]] = {
    "layer": lambda r: r.layer,
    "module": lambda r: r.layer,
    "batch norm": lambda r: r.batch_norm,
    "rule": lambda r: _WANTED[r.kind],
    "epilogue": lambda r: r.epilogue,
    "layer's output": _shape,
    "tensor": _shape,
    "bytes": lambda r: _size(r.output_bytes) if r.output_bytes else "",
    "bytes not saved": lambda r: _size(r.bytes_saved) if r.code.rewritten else "",
    "bytes as written": lambda r: _size(r.bytes_exact),
    "bytes folded": lambda r: _size(r.bytes_folded),
    "decision": _decision,
}
_WANTED: dict[Kind, str] = {
    "shape": "read for its shape",
    "activation": "activation's mask",
    "pooling": "mask before pooling",
    "mask": "mask as bits",
}
# By title: kinds of records, and columns.
_TABLES: dict[str, tuple[Collection[str], tuple[str, ...]]] = {
    "Batch norms and the layers before them": (
        ["batch norm"],
        ("layer", "batch norm", "layer's output", "bytes", "bytes not saved", "decision"),
    ),
    "Other trained scales, by the layers before them": (
        ["scale"],
        ("layer", "layer's output", "bytes", "bytes not saved", "decision"),
    ),
    "Wanted gradients: tensors that backward does not need": (
        _WANTED,
        ("module", "rule", "tensor", "bytes not saved", "decision"),
    ),
    "Forward folding: layers and their epilogues": (
        ["layer"],
        ("layer", "epilogue", "bytes as written", "bytes folded", "decision"),
    ),
}
