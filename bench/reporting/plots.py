"""Result rows as pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

from ..protocols import PROTOCOLS
from ..providers import PROVIDERS
from ..results import Row
from .analysis import Group, groups, ratio
from .tables import overview

__all__ = ["draw"]

# Okabe and Ito's palette, which people with any colour vision can tell apart.
_COLOURS = {"eval": "#999999", "builtin": "#E69F00", "ours": "#0072B2", "deploy": "#009E73"}


def draw(rows: list[Row], folder: Path) -> dict[str, Path]:
    """Draw what there are results for; returns the pictures by title."""
    pictures: dict[str, Path] = {}
    if chosen := overview(rows):
        pictures["Saved for backward, megabytes"] = _overview(chosen, folder / "overview.png")
    saved = [
        g
        for g in groups(rows, "saved")
        if g.settings.protocol == "all" and g.values("eval") and g.values("ours")
    ]
    first: dict[str, Group] = {}
    for group in saved:
        first.setdefault(group.settings.case, group)
    saved = list(first.values())
    if saved:
        title = "Saved for backward, relative to compiled eval mode"
        pictures[title] = _bars(saved, title, _saved_ratio, folder / "saved.png")
    for device in ("cpu", "cuda"):
        timed = [
            g
            for g in groups(rows, "measure")
            if g.settings.device == device
            and PROTOCOLS[g.settings.protocol].trains
            and ratio(g, "ours", "eval") is not None
        ]
        if timed:
            title = f"Step time on {device}, relative to compiled eval mode"
            path = folder / f"time-{device}.png"
            pictures[title] = _bars(timed, title, lambda g, p: ratio(g, p, "eval"), path)
            title = f"Peak memory on {device}, relative to compiled eval mode"
            pictures[title] = _bars(timed, title, _peak_ratio, folder / f"peak-{device}.png")
        for group in timed:
            if any("budget" in name and ratio(group, name, "eval") for name in group.rows):
                title = f"Memory and time, {group.settings.case} on {device}"
                path = folder / f"recompute-{group.settings.case}-{device}.png"
                pictures[title] = _scatter(group, title, path)
    capacities = [g for g in groups(rows, "capacity") if g.values("ours")]
    if capacities:
        title = "Largest batch under the memory cap"
        path = folder / "capacity.png"
        pictures[title] = _bars(
            capacities, title, lambda g, p: g.values(p).get("largest_batch"), path
        )
    return pictures


def _overview(chosen: list[tuple[str, str, Group]], path: Path) -> Path:
    """Eval mode's megabytes against ours, the largest workload's bar filling the width."""
    figure, axes = plt.subplots(figsize=(9, 0.55 * len(chosen) + 0.9))
    for y, (_, _, group) in enumerate(chosen):
        sizes = [group.values(mode)["bytes"] / 1e6 for mode in ("eval", "ours")]
        for offset, size, mode in zip((-0.19, 0.19), sizes, ("eval", "ours"), strict=True):
            axes.barh(y + offset, size, 0.36, color=_COLOURS[mode])
        axes.text(sizes[0], y - 0.19, f" {sizes[0]:,.0f}", va="center", fontsize=9)
        text = f" {sizes[1]:,.0f} MB, {1 - sizes[1] / sizes[0]:.0%} less"
        axes.text(sizes[1], y + 0.19, text, va="center", fontsize=9, weight="bold")
    axes.set_yticks(range(len(chosen)), [f"{name}\ntrained: {what}" for name, what, _ in chosen])
    axes.tick_params(axis="y", labelsize=8.5, length=0)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    handles = [Patch(color=_COLOURS[m]) for m in ("eval", "ours")]
    labels = ["eval mode, torch.compile", "with convbn_inductor_pass"]
    axes.legend(handles, labels, loc="lower right", frameon=False)
    axes.set_title("Megabytes saved for backward", loc="left", fontsize=11)
    return _save(figure, path)


def _saved_ratio(group: Group, provider: str) -> float | None:
    value, baseline = group.values(provider).get("bytes"), group.values("eval")["bytes"]
    return value / baseline if value is not None and baseline else None


def _peak_ratio(group: Group, provider: str) -> float | None:
    pair = [group.peak(name) for name in (provider, "eval")]
    return pair[0] / pair[1] if pair[0] and pair[1] else None


def _bars(
    chosen: list[Group], title: str, value: Callable[[Group, str], float | None], path: Path
) -> Path:
    """Horizontal bars, one group of providers per workload; a line where eval mode is 1."""
    names = [p for p in _COLOURS if any(value(g, p) is not None for g in chosen)]
    relative = len(names) > 1 and all(value(g, "eval") == 1 for g in chosen)
    names = names[1:] if relative else names
    height = 0.8 / len(names)
    figure, axes = plt.subplots(figsize=(8, 1.5 + 0.12 * len(names) * len(chosen)))
    for i, name in enumerate(names):
        found = [(y, value(group, name)) for y, group in enumerate(chosen)]
        points = [(y, v) for y, v in found if v is not None]
        axes.barh(
            [y + (i - (len(names) - 1) / 2) * height for y, _ in points],
            [v for _, v in points],
            height,
            label=PROVIDERS[name].title,
            color=_COLOURS[name],
        )
    if relative:
        axes.axvline(1, color=_COLOURS["eval"], label=PROVIDERS["eval"].title)
    axes.set_yticks(range(len(chosen)), [g.label(size=True) for g in chosen])
    axes.invert_yaxis()
    axes.set_ylim(len(chosen) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return _save(figure, path)


def _scatter(group: Group, title: str, path: Path) -> Path:
    """Peak memory against step time, with the curves that activation budgets give."""
    figure, axes = plt.subplots(figsize=(7, 4.5))

    def points(names: list[str]) -> list[tuple[float, float]]:
        pairs = [(group.peak(n), ratio(group, n, "eval")) for n in names]
        return [(p / 1e6, r) for p, r in pairs if p is not None and r is not None]

    for who in ("eval", "ours"):
        budgets = [n for n in PROVIDERS if n.startswith(f"{who}-budget-") and n in group.rows]
        curve = points([who, *budgets])
        axes.plot(
            *zip(*curve, strict=True),
            marker=".",
            color=_COLOURS[who],
            label=f"{PROVIDERS[who].title}, recomputing more and more",
        )
    for name in ("builtin", "deploy", "eval", "ours"):
        for x, y in points([name]):
            axes.scatter(x, y, s=70, color=_COLOURS[name], zorder=3)
            axes.annotate(PROVIDERS[name].title, (x, y), xytext=(6, 6), textcoords="offset points")
    axes.set_xlabel("peak memory, MB")
    axes.set_ylabel("step time relative to compiled eval mode")
    axes.grid(alpha=0.3)
    axes.set_title(title, loc="left")
    axes.legend(frameon=False)
    return _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> Path:
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return path
