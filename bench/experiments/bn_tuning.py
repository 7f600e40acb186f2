"""Linear probing, BN-tuning and end-to-end fine-tuning, many-shot and few-shot.

What to see: the accuracies, and what each protocol saves for backward compiled in eval mode and
with the package. In BN-tuning backward needs the convolutions' outputs for the batch norms' weights
and nothing else: no layer's input, no mask, and no weight gradient is computed.

    python -m bench experiment bn_tuning
"""

from __future__ import annotations

import collections
from typing import Any

import torch
from torch import nn

import convbn_inductor_pass as package

from . import lab

PROTOCOLS = ("linear probing", "BN-tuning", "end-to-end")
SEEDS = (0, 1, 2)


def prepare(model: nn.Module, protocol: str) -> None:
    """Let train what the protocol trains."""
    for name, parameter in model.named_parameters():
        norm = "bn" in name or name.startswith("stem.1") or ".down.1" in name
        parameter.requires_grad_(
            name.startswith("head")
            or protocol == "end-to-end"
            or (protocol == "BN-tuning" and norm)
        )


def few(split: lab.Split, shots: int, seed: int) -> lab.Split:
    """``shots`` images per class."""
    x, y = split
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    chosen = torch.cat([order[y[order] == c][:shots] for c in range(5)])
    return x[chosen], y[chosen]


def run() -> lab.Found:
    train, test = lab.digits(5, 9)
    rows: list[dict[str, Any]] = []
    explained: dict[str, dict[str, Any]] = {}
    for seed in SEEDS:
        pretrained = lab.pretrain(seed)
        for protocol in PROTOCOLS:
            for shots in (None, 5):
                split = train if shots is None else few(train, shots, seed)
                model = lab.in_mode(pretrained, "tune", seed)
                prepare(model, protocol)
                lab.fine_tune(
                    model,
                    split,
                    lr=0.05 if protocol == "linear probing" else 0.01,
                    epochs=12 if shots is None else 40,
                    batch=32 if shots is None else 5,
                    parameters=[p for p in model.parameters() if p.requires_grad],
                )
                rows.append(
                    {
                        "protocol": protocol,
                        "shots": shots or "all",
                        "seed": seed,
                        "accuracy": lab.accuracy(model, test),
                    }
                )
            if seed == SEEDS[0]:
                x = train[0][:32]
                compiled = package.explain(package.turn_off(model), x)
                package.turn_on(model)
                model(x)
                decided = collections.Counter(r.code.name for r in package.decisions(model))
                explained[protocol] = {
                    "trainable_parameters": sum(
                        p.numel() for p in model.parameters() if p.requires_grad
                    ),
                    "compiled_decisions": collections.Counter(
                        r.code.name for r in compiled.batch_norms
                    ),
                    "compiled_saved_bytes": compiled.saved_bytes,
                    "eager_decisions": decided,
                }
    summary = {
        protocol: {
            "accuracy_all": mean(rows, protocol, "all"),
            "accuracy_5_shots": mean(rows, protocol, 5),
            **explained[protocol],
        }
        for protocol in PROTOCOLS
    }
    fig, axes = lab.figure(3, "Transfer 0-4 to 5-9 by protocol")
    for ax, key in zip(axes, ("accuracy_all", "accuracy_5_shots"), strict=False):
        ax.bar(PROTOCOLS, [summary[p][key] for p in PROTOCOLS])
        ax.set(title=key.replace("_", " "), ylim=(0, 1))
    for mode, label, shift in (("eval", "eval mode", -0.2), ("tune", "with the package", 0.2)):
        sizes = [summary[p]["compiled_saved_bytes"][mode] / 1e6 for p in PROTOCOLS]
        axes[2].bar([i + shift for i in range(len(PROTOCOLS))], sizes, width=0.4, label=label)
    axes[2].set(title="MB saved for backward, 32 images", xticks=range(len(PROTOCOLS)))
    axes[2].set_xticklabels(PROTOCOLS)
    axes[2].legend()
    return {"summary": summary, "rows": rows}, fig


def mean(rows: list[dict], protocol: str, shots: int | str) -> float:
    chosen = [r["accuracy"] for r in rows if r["protocol"] == protocol and r["shots"] == shots]
    return round(sum(chosen) / len(chosen), 4)
