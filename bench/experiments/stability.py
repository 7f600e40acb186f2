"""Deploy mode in training: a learning-rate sweep, and scales of weight and gradient.

Claims: merging multiplies a channel's weight by s and divides its gradient by s, so that the
relative size of a step changes by 1/s^2; and deploy diverges at learning rates at which eval
and tune train. The first holds exactly. The second needs scales s well below 1, and depends on
how the network was pretrained: with weight decay, which keeps weights small and so s about 1, or
at a high rate without, which makes weights grow, since a batch norm takes their size out again.

    python -m bench experiment stability
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import lab

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
MODES = ("eval", "tune", "deploy")
SEEDS = (0, 1, 2)
# How a network is pretrained, by the name of the result.
PRETRAINING: dict[str, dict[str, float]] = {
    "rate 0.1, weight decay": {"lr": 0.1, "weight_decay": 5e-4},
    "rate 1, no weight decay": {"lr": 1.0, "weight_decay": 0.0},
}


def running(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Running mean and variance."""
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("a batch norm without running statistics")
    return bn.running_mean, bn.running_var


def norm(t: Tensor | None) -> Tensor:
    """Length of each output channel of a weight or its gradient."""
    return torch.zeros(0) if t is None else t.detach().flatten(1).norm(dim=1)


def pairs(model: lab.Net) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """The convolutions and batch norms of a network, pair by pair, in the order of modules."""
    modules = list(model.modules())
    convs = [m for m in modules if isinstance(m, nn.Conv2d)]
    norms = [m for m in modules if isinstance(m, nn.BatchNorm2d)]
    return list(zip(convs, norms, strict=True))


def scales(model: lab.Net, train: lab.Split) -> dict[str, list]:
    """Per channel: the scale s, and how merging changes the norms of weight and gradient."""
    merged = lab.in_mode(model, "deploy")
    original = lab.in_mode(model, "eval")
    for m in (original, merged):
        F.cross_entropy(m(train[0][:256]), train[1][:256]).backward()
    found: dict[str, list] = {"layer": [], "scale": [], "weight": [], "gradient": []}
    merged_convs = [m for m in merged.modules() if isinstance(m, nn.Conv2d)]
    for i, ((conv, bn), new) in enumerate(zip(pairs(original), merged_convs, strict=True)):
        s = (bn.weight / (running(bn)[1] + bn.eps).sqrt()).detach().abs()
        used = norm(conv.weight.grad) > 1e-12  # dead channels have no gradient to compare
        found["layer"] += [i] * int(used.sum())
        found["scale"] += s[used].tolist()
        found["weight"] += (norm(new.weight) / norm(conv.weight))[used].tolist()
        found["gradient"] += (norm(new.weight.grad) / norm(conv.weight.grad))[used].tolist()
    return found


def sweep(name: str, network: lab.Net, seed: int) -> list[dict[str, Any]]:
    """Transfer of one network at every rate and in every mode."""
    train, test = lab.digits(5, 9)
    rows = []
    for lr in RATES:
        for mode in MODES:
            model = lab.in_mode(network, mode, seed)
            losses = lab.fine_tune(model, train, lr=lr, epochs=4)["losses"]
            last = sum(losses[-5:]) / 5
            trained = math.isfinite(last) and last < math.log(5)  # better than a guess
            rows.append(
                {
                    "network": name,
                    "seed": seed,
                    "mode": mode,
                    "lr": lr,
                    "trained": trained,
                    "final_loss": last if math.isfinite(last) else None,
                    "accuracy": lab.accuracy(model, test) if trained else 0.2,
                }
            )
    return rows


def summarise(rows: list[dict[str, Any]], network: str, mode: str) -> dict[str, Any]:
    """Over seeds: the rates at which all of them train, and mean accuracies by rate."""
    chosen = [r for r in rows if r["network"] == network and r["mode"] == mode]
    by_rate = [[r for r in chosen if r["lr"] == lr] for lr in RATES]
    return {
        "trains_at": [r[0]["lr"] for r in by_rate if all(x["trained"] for x in r)],
        "seeds_that_train": [sum(x["trained"] for x in r) for r in by_rate],
        "accuracy": [round(sum(x["accuracy"] for x in r) / len(r), 4) for r in by_rate],
    }


def run() -> lab.Found:
    rows: list[dict[str, Any]] = []
    measured: dict[str, dict[str, list]] = {}
    for name, options in PRETRAINING.items():
        for seed in SEEDS:
            network = lab.pretrain(seed, **options)  # type: ignore[arg-type]
            rows += sweep(name, network, seed)
            if seed == SEEDS[0]:
                measured[name] = scales(network, lab.digits(5, 9)[0])
    exact = max(
        max(abs(w / s - 1), abs(g * s - 1))
        for m in measured.values()
        for s, w, g in zip(m["scale"], m["weight"], m["gradient"], strict=True)
    )
    summary = {
        "rates": RATES,
        **{n: {mode: summarise(rows, n, mode) for mode in MODES} for n in PRETRAINING},
        "scale_min_median_max": {
            n: [min(m["scale"]), statistics.median(m["scale"]), max(m["scale"])]
            for n, m in measured.items()
        },
        "largest_deviation_from_inverse_scaling": exact,
    }
    fig, axes = lab.figure(3, "Deploy mode in training, by how the network was pretrained")
    for ax, n in zip(axes, PRETRAINING, strict=False):
        for mode, style in zip(MODES, ("-o", "--x", ":s"), strict=True):
            ax.plot(RATES, summarise(rows, n, mode)["accuracy"], style, label=mode)
        ax.set(xscale="log", xlabel="learning rate", ylabel="accuracy", title=n, ylim=(0, 1.02))
        ax.legend()
    for n, m in measured.items():
        axes[2].loglog(m["weight"], m["gradient"], ".", markersize=3, label=n)
    axes[2].set(
        xlabel="|merged W| / |W|", ylabel="|merged gradient| / |gradient|", title="channels"
    )
    axes[2].legend(fontsize=7)
    return {"summary": summary, "rows": rows, "scales": measured}, fig
