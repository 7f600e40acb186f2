"""Deploy mode in training: a learning-rate sweep, and scales of weight and gradient.

Claims: merging multiplies a channel's weight by s and divides its gradient by s, so that the
relative size of a step changes by 1/s^2; and deploy diverges at learning rates at which eval
and tune train. The first holds exactly. Of the second, README.md says what reproduces here.

    python -m bench.experiments.stability
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import lab

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
MODES = ("eval", "tune", "deploy")


def spread(model: lab.Net, factor: float = 16.0) -> lab.Net:
    """Another network that computes the same: channels' weights rescaled, norms compensating.

    Multiplies each channel's weight by 1 to ``factor`` and scales its statistics along, which a
    batch norm undoes exactly up to eps. A network as small as ours does not get such scales
    from its training; those of large pretrained ones vary by orders of magnitude.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for conv, bn in pairs(model):
            k = factor ** (torch.rand(len(bn.weight), generator=generator))
            conv.weight.mul_(k[:, None, None, None])
            mean, var = statistics(bn)
            mean.mul_(k)
            var.mul_(k * k)
    return model


def statistics(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
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
        s = (bn.weight / (statistics(bn)[1] + bn.eps).sqrt()).detach().abs()
        used = norm(conv.weight.grad) > 1e-12  # dead channels have no gradient to compare
        found["layer"] += [i] * int(used.sum())
        found["scale"] += s[used].tolist()
        found["weight"] += (norm(new.weight) / norm(conv.weight))[used].tolist()
        found["gradient"] += (norm(new.weight.grad) / norm(conv.weight.grad))[used].tolist()
    return found


def main() -> None:
    out, started = lab.arguments(__doc__), time.time()
    train, test = lab.digits(5, 9)
    trained = lab.pretrain(0)
    rows: list[dict[str, Any]] = []
    for name, model in (("as trained", trained), ("scales spread", spread(lab.pretrain(0)))):
        for lr in RATES:
            for mode in MODES:
                copy = lab.in_mode(model, mode)
                run = lab.fine_tune(copy, train, lr=lr, epochs=4)
                last = run["losses"][-5:]
                ok = all(map(math.isfinite, last)) and sum(last) / len(last) < math.log(5)
                rows.append(
                    {
                        "network": name,
                        "mode": mode,
                        "lr": lr,
                        "final_loss": sum(last) / len(last) if ok else None,
                        "trained": ok,
                        "accuracy": lab.accuracy(copy, test) if ok else 0.2,
                    }
                )
    measured = {
        "as trained": scales(trained, train),
        "scales spread": scales(spread(lab.pretrain(0)), train),
    }
    exact = max(
        max(abs(w / s - 1), abs(g * s - 1))
        for m in measured.values()
        for s, w, g in zip(m["scale"], m["weight"], m["gradient"], strict=True)
    )
    summary = {
        "largest_learning_rate_that_trains": {
            n: {
                mode: max(
                    (
                        r["lr"]
                        for r in rows
                        if r["network"] == n and r["mode"] == mode and r["trained"]
                    ),
                    default=0,
                )
                for mode in MODES
            }
            for n in measured
        },
        "accuracy": {
            n: {
                mode: [r["accuracy"] for r in rows if r["network"] == n and r["mode"] == mode]
                for mode in MODES
            }
            for n in measured
        },
        "scale_min_max": {n: [min(m["scale"]), max(m["scale"])] for n, m in measured.items()},
        "largest_deviation_from_inverse_scaling": exact,
    }
    fig, axes = lab.figure(3, "Deploy mode in training")
    for ax, n in zip(axes, measured, strict=False):
        for mode, style in zip(MODES, ("-o", "--x", ":s"), strict=True):
            points = [r for r in rows if r["network"] == n and r["mode"] == mode]
            ax.plot([r["lr"] for r in points], [r["accuracy"] for r in points], style, label=mode)
        ax.set(xscale="log", xlabel="learning rate", ylabel="accuracy", title=n, ylim=(0, 1.02))
        ax.legend()
    m = measured["scales spread"]
    axes[2].loglog(m["weight"], m["gradient"], ".", markersize=3)
    axes[2].set(
        xlabel="|merged W| / |W|", ylabel="|merged gradient| / |gradient|", title="channels"
    )
    lab.write(
        "stability", {"summary": summary, "rows": rows, "scales": measured}, fig, out, started
    )


if __name__ == "__main__":
    main()
