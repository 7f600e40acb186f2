"""Adversarial examples by projected gradient descent, in Eval and in Tune mode.

Claim: tune finds the examples that eval finds, with less memory and no more time.

    python -m bench experiment adversarial
"""

from __future__ import annotations

import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import lab

EPSILON, STEP, STEPS = 0.25, 0.05, 20


def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Images within EPSILON of ``x`` [N, 1, 8, 8], in the largest norm, that raise the loss."""
    adversary = x.clone()
    for _ in range(STEPS):
        adversary.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(adversary), y), adversary)
        moved = adversary.detach() + STEP * gradient.sign()
        adversary = x + (moved - x).clamp(-EPSILON, EPSILON)
    return adversary.detach()


def run() -> lab.Found:
    _, (x, y) = lab.digits(0, 4)
    pretrained = lab.pretrain(0)
    models: dict[str, lab.Net] = {}
    for mode in ("eval", "tune"):
        models[mode] = lab.in_mode(pretrained, mode)
        models[mode].head.load_state_dict(pretrained.head.state_dict())
    found: dict[str, Tensor] = {}
    saved: dict[str, int] = {}
    times: dict[str, list[float]] = {m: [] for m in models}
    for mode, model in models.items():
        saved[mode] = lab.saved_bytes(model, x, partial(F.cross_entropy, target=y))
    for _ in range(7):  # interleaved, so that a busy machine is unfair to nobody
        for mode, model in models.items():
            start = time.perf_counter()
            found[mode] = attack(model, x, y)
            times[mode].append(time.perf_counter() - start)
    difference = (found["eval"] - found["tune"]).abs()
    summary = {
        "clean_accuracy": lab.accuracy(pretrained, (x, y)),
        "adversarial_accuracy": {m: lab.accuracy(pretrained, (found[m], y)) for m in models},
        "pixels_that_differ": (difference > 1e-4).float().mean().item(),
        "images_classified_differently": (
            (pretrained(found["eval"]).argmax(1) != pretrained(found["tune"]).argmax(1))
            .sum()
            .item()
        ),
        "images": len(x),
        "saved_bytes": saved,
        "median_seconds": {m: round(sorted(t)[3], 4) for m, t in times.items()},
    }
    fig, axes = lab.figure(3, "Projected gradient descent: image, found in eval mode, in tune mode")
    for ax, image in zip(axes, (x[0], found["eval"][0], found["tune"][0]), strict=True):
        ax.imshow(image[0], cmap="gray", vmin=-1, vmax=1)
        ax.axis("off")
    return {"summary": summary, "attack_seconds": times}, fig
