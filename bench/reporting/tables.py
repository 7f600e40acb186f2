"""Result rows as Markdown tables. What was not run reads "not measured", never a guess."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ..cases import CASES
from ..protocols import PROTOCOLS
from ..providers import PROVIDERS
from ..results import Row
from ..suites import settings_of
from .analysis import Group, geometric_mean, groups, ratio, spread
from .reasons import why, why_little
from .references import PUBLISHED

__all__ = [
    "NONE",
    "capacities",
    "exceptions",
    "machine",
    "measured",
    "overview",
    "overview_table",
    "problems",
    "published",
    "recomputation",
    "saved",
    "show",
    "small_gains",
    "totals",
]

NONE = "not measured"
MODES = ("eval", "builtin", "ours", "deploy")


def show(header: Sequence[str], rows: list[list[str]], *, as_markdown: bool, width: int) -> None:
    """Print a table, for people or for a document."""
    if as_markdown:
        print(markdown(list(header), rows))
        return
    table = Table(*header)
    for cells in rows:
        table.add_row(*cells)
    Console(width=width).print(table)


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table; all but the first column align to the right."""
    rule = [":--"] + ["--:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *rows])


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def _megabytes(count: float | None) -> str:
    return NONE if count is None else f"{count / 1e6:,.1f}"


def saved(rows: list[Row]) -> str:
    """Bytes saved for backward: every workload, four modes, and what of ours is not activations."""
    body = []
    for group in groups(rows, "saved"):
        values = {mode: group.values(mode) for mode in MODES}
        if not values["ours"] or not values["eval"]:
            continue
        baseline, ours = values["eval"]["bytes"], values["ours"]["bytes"]
        kinds = ", ".join(
            f"{kind} {values['ours'][f'{kind}_bytes'] / 1e6:,.1f}"
            for kind in ("weight", "mask")
            if values["ours"][f"{kind}_bytes"]
        )
        body.append(
            [group.label(size=True)]
            + [_megabytes(values[mode].get("bytes")) for mode in MODES]
            + [f"{ours / baseline - 1:+.1%}" if baseline else "0.0%", kinds]
        )
    header = ["workload, MB", *(PROVIDERS[m].title for m in MODES), "ours to eval", "ours: of it"]
    return markdown(header, body)


_OVERVIEW = (
    ("resnet50", "all", "ResNet-50"),
    ("mobilenet_v2", "all", "MobileNetV2"),
    ("vgg16_bn", "all", "VGG16-BN"),
    ("faster_rcnn_resnet50", "frozen-stages", "Faster R-CNN, up to the region heads"),
    ("resnet50", "bn-tuning", "ResNet-50"),
    ("resnet50", "adversarial", "ResNet-50"),
    ("vgg19", "perceptual-loss", "VGG-19"),
    ("dcgan_discriminator", "gan-discriminator", "DCGAN's discriminator"),
)
_TRAINED = {
    "all": "everything",
    "frozen-stages": "all but the first stage",
    "bn-tuning": "batch norms (BN-tuning)",
    "adversarial": "the input (adversarial examples)",
    "perceptual-loss": "the input (perceptual loss)",
    "gan-discriminator": "the input (the generator's step)",
}


def overview(rows: list[Row]) -> list[tuple[str, str, Group]]:
    """A few workloads of different kinds: network, what is trained, and its rows."""
    found = []
    for case, protocol, name in _OVERVIEW:
        for group in groups(rows, "saved"):
            s = group.settings
            usual = s.memory_format == "contiguous" and not s.dynamic
            if (s.case, s.protocol) == (case, protocol) and s.precision == "float32" and usual:
                found.append((name, _TRAINED[protocol], group))
                break
    return found


def overview_table(rows: list[Row]) -> str:
    """:func:`overview` in Markdown, megabytes."""
    header = ["network", "input", "trained", "eval mode", "deploy mode", "this package", "less"]
    body = []
    for name, trained, group in overview(rows):
        size = "x".join(str(n) for n in (group.settings.batch, *group.settings.shape))
        sizes = [group.values(mode)["bytes"] for mode in ("eval", "deploy", "ours")]
        less = f"{1 - sizes[2] / sizes[0]:.0%}"
        body.append([name, size, trained, *(f"{s / 1e6:,.0f}" for s in sizes), less])
    return markdown(header, body)


def exceptions(rows: list[Row]) -> str:
    """Workloads in which ours saves more than another mode, each with the reason."""
    body = []
    for group in groups(rows, "saved"):
        ours = group.values("ours").get("bytes")
        if ours is None:
            continue
        for mode in ("eval", "builtin", "deploy"):
            other = group.values(mode).get("bytes")
            if other is None or ours <= other:
                continue
            cells = [group.label(size=True), _megabytes(ours), PROVIDERS[mode].title]
            difference = f"{(ours - other) / 1e6:+,.3f}"
            body.append([*cells, _megabytes(other), difference, why(group.settings, mode)])
    return markdown(["workload", "ours MB", "other", "MB", "ours - other", "why"], body)


def small_gains(rows: list[Row], least: float = 0.1) -> str:
    """Workloads in which ours reduces the bytes by less than ``least``, each with the reason."""
    body = []
    for group in groups(rows, "saved"):
        ours, baseline = (group.values(mode).get("bytes") for mode in ("ours", "eval"))
        if ours is None or baseline is None or ours < (1 - least) * baseline:
            continue
        gain = f"{1 - ours / baseline if baseline else 0.0:.1%}"
        cells = [group.label(size=True), _megabytes(baseline), _megabytes(ours), gain]
        body.append([*cells, why_little(group.settings)])
    return markdown(["workload", "eval MB", "ours MB", "less", "why"], body)


def published(rows: list[Row]) -> str:
    """The paper's rows beside ours: its peak; our bytes saved and, where it was run, our peak."""
    exact = {g.settings.case: g for g in groups(rows, "saved") if _usual(g)}
    ran = {g.settings.case: g for g in groups(rows, "measure") if _usual(g, "cuda")}
    body = []
    for entry in PUBLISHED:
        cells = [entry.what, _change(entry.eval_gb * 1e9, entry.tune_gb * 1e9)]
        for group, peak in ((exact.get(entry.case), False), (ran.get(entry.case), True)):
            before, after = (
                None if group is None else group.peak(m) if peak else group.values(m).get("bytes")
                for m in ("eval", "ours")
            )
            cells.append(_change(before, after))
        body.append([*cells, entry.source])
    header = ["eval mode → tune mode", "published: peak", "ours: saved for backward, compiled"]
    return markdown([*header, "ours: peak on a GPU", "published in"], body)


def _usual(group: Group, device: str = "cpu") -> bool:
    """Whether a workload is its case at its real size and precision, all parameters trainable."""
    case = CASES[group.settings.case]
    return group.settings == settings_of(case, precision=case.precision, device=device)


def _change(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return NONE
    return f"{before / 1e9:.2f} → {after / 1e9:.2f} GB ({after / before - 1:.1%})"


def measured(rows: list[Row], device: str, *, trains: bool) -> str:
    """Step times with quantiles and ratios, peaks and code, one line per provider."""
    body = []
    for group in groups(rows, "measure"):
        protocol = PROTOCOLS[group.settings.protocol]
        if group.settings.device != device or protocol.trains != trains:
            continue
        for name, row in group.rows.items():
            v = row.values
            if not v:
                continue
            times = spread(v["step_ms"]) if v.get("step_ms") else None
            phases = [
                _number(spread(v[n]).median if v.get(n) else None, ",.1f")
                for n in ("forward_ms", "backward_ms")
            ]
            body.append(
                [group.label(size=True), PROVIDERS[name].title]
                + [f"{times.median:,.1f} ({times.low:,.1f}-{times.high:,.1f})" if times else NONE]
                + (phases if trains else [])
                + [_number(ratio(group, name, other), ".3f") for other in ("eval", "deploy")]
                + [_megabytes(group.peak(name))]
                + _code(v)
                + [f"{v['output_error']:.1e}", _number(v.get("gradient_error"), ".1e")]
            )
    phases = ["forward", "backward"] if trains else []
    header = ["workload", "provider", "step ms, median (20-80%)", *phases, "to eval", "to deploy"]
    header += ["peak MB", "kernels own + library", "traffic MB", "first step s", "passes"]
    return markdown([*header, "output error", "gradient error"], body)


def _code(values: dict[str, Any]) -> list[str]:
    first = values["first_step_s"]
    if "generated_kernels" not in values:
        return ["", "", f"{first:.1f}", ""]
    return [
        f"{values['generated_kernels']} + {values['extern_kernels']}",
        f"{values['bytes_moved'] / 1e6:,.1f}",
        f"{first:.1f}",
        f"{values['pass_seconds'] / first:.2%}",
    ]


def totals(rows: list[Row], device: str) -> str:
    """Geometric means over all training workloads of ours to the others, in time and peak."""
    chosen = [
        g
        for g in groups(rows, "measure")
        if g.settings.device == device and PROTOCOLS[g.settings.protocol].trains
    ]

    def times(group: Group, other: str) -> float | None:
        return ratio(group, "ours", other)

    def peaks(group: Group, other: str) -> float | None:
        ours, theirs = group.peak("ours"), group.peak(other)
        return ours / theirs if ours and theirs else None

    def line(other: str, of: Callable[[Group, str], float | None]) -> list[str]:
        found = [value for group in chosen if (value := of(group, other)) is not None]
        worst = max(found, default=None)
        mean = geometric_mean(found)
        return [_number(mean, ".3f"), _number(worst, ".3f"), str(len(found))]

    body = [
        [f"ours to {PROVIDERS[other].title}", *line(other, times), *line(other, peaks)]
        for other in ("eval", "builtin", "deploy")
    ]
    return markdown(["", "step time", "worst", "n", "peak memory", "worst", "n"], body)


def recomputation(rows: list[Row]) -> str:
    """Activation memory budgets: what is saved and, where measured, how long a step takes."""
    timed = {
        (g.settings.case, g.settings.device): g
        for g in groups(rows, "measure")
        if any("budget" in name for name in g.rows)
    }
    body = []
    for group in groups(rows, "saved"):
        budgets = [name for name in group.rows if "budget" in name]
        if not budgets:
            continue
        for name in ["eval", "ours", *budgets]:
            size = _megabytes(group.values(name).get("bytes"))
            cells = [group.label(size=True), PROVIDERS[name].title, size]
            for device in ("cpu", "cuda"):
                other = timed.get((group.settings.case, device))
                cells.append(_number(ratio(other, name, "eval") if other else None, ".3f"))
            body.append(cells)
    header = ["workload", "", "saved MB", "step to eval, CPU", "step to eval, GPU"]
    return markdown(header, body)


def capacities(rows: list[Row]) -> str:
    """Largest batch under a cap, and the throughput there."""
    body = []
    for group in groups(rows, "capacity"):
        for name, row in group.rows.items():
            v = row.values
            if not v:
                continue
            where = f"{group.settings.case} ({group.settings.device})"
            cap, batch = _megabytes(v["cap_bytes"]), str(v["largest_batch"])
            needed, speed = _megabytes(v.get("needed_bytes")), v.get("examples_per_s")
            body.append([where, PROVIDERS[name].title, cap, batch, needed, _number(speed, ",.1f")])
    return markdown(["workload", "", "cap MB", "batch", "needed there MB", "examples/s"], body)


def problems(rows: list[Row]) -> str:
    """What was skipped or failed, with the reason, one line per workload and reason."""
    lines = {
        f"- {group.metric} {group.label(size=True)}: {row.problem}": None
        for metric in ("saved", "measure", "capacity", "cuda-codegen")
        for group in groups(rows, metric)
        for row in group.rows.values()
        if row.problem
    }
    return "\n".join(lines)


def machine(runs: list[dict[str, Any]]) -> str:
    """Machines, versions and commits that the results come from."""
    body = []
    for run in runs:
        versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items() if v)
        gpu = run["gpu"]["name"] if run["gpu"] else "none"
        commit = run["commit"] + (
            f" + {run['changed_files']} changed" if run["changed_files"] else ""
        )
        cpu = f"{run['cpu']}, {run['torch_threads']} threads"
        body.append([run["file"], run["time"], commit, cpu, gpu, versions])
    return markdown(["file", "time", "commit", "CPU", "GPU", "versions"], body)
