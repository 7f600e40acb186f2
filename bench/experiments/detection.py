"""A small detector on synthetic scenes: frozen first stages, batch norms in eval mode, trained.

Scenes are 32x32 with up to four digits pasted in; the network predicts for each cell of an 8x8
grid whether a digit is there and which. As in detection training, stem and first block are
frozen, the batch norms use running statistics, and their affine parameters train elsewhere.
Claim: tune trains as eval does, with less memory.

    python -m bench experiment detection
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convbn_inductor_pass as package

from . import lab

GRID, CELL, SCENES, EPOCHS, BATCH, RATE = 8, 4, 512, 12, 32, 0.01


class Detector(nn.Module):
    """Logits [N, 11, 8, 8]: objectness, then ten classes, per cell."""

    def __init__(self, backbone: lab.Net) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = nn.Sequential(nn.Conv2d(64, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32))
        self.head = nn.Conv2d(32, 11, 1)
        for part in (backbone.stem, backbone.blocks[0], backbone.head):
            part.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.neck(self.backbone.features(x))))


def scenes(count: int, seed: int, train: bool) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 32, 32] and targets [N, 8, 8]: -1 where there is nothing, else the digit."""
    (train_x, train_y), (test_x, test_y) = lab.digits(0, 9)
    x, y = (train_x, train_y) if train else (test_x, test_y)
    generator = torch.Generator().manual_seed(seed)
    images, targets = -torch.ones(count, 1, 32, 32), -torch.ones(count, GRID, GRID).long()
    for n in range(count):
        for quadrant in torch.randperm(4, generator=generator)[: 1 + n % 4].tolist():
            top, left = torch.randint(0, 9, (2,), generator=generator).tolist()
            top, left = top + 16 * (quadrant // 2), left + 16 * (quadrant % 2)
            chosen = int(torch.randint(len(x), (1,), generator=generator))
            images[n, 0, top : top + 8, left : left + 8] = x[chosen, 0]
            targets[n, (top + 4) // CELL, (left + 4) // CELL] = y[chosen]
    return images, targets


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    present = (targets >= 0).float()
    objectness = F.binary_cross_entropy_with_logits(
        logits[:, 0], present, pos_weight=torch.tensor(10.0)
    )
    return objectness + F.cross_entropy(logits[:, 1:], targets, ignore_index=-1)


def f1(model: nn.Module, images: Tensor, targets: Tensor) -> float:
    """Of cells: found, at the right place and with the right class."""
    with torch.no_grad():
        logits = model(images)
    found, present = logits[:, 0] > 0, targets >= 0
    right = (found & present & (logits[:, 1:].argmax(1) == targets)).sum().item()
    return 2 * right / max(int(found.sum() + present.sum()), 1)


def train_detector(
    mode: Literal["eval", "tune"],
    train: lab.Split,
    test: lab.Split,
    dtype: torch.dtype,
    epochs: int,
) -> dict[str, Any]:
    """Fine-tune; losses, F1, saved bytes, median step time and fused pairs."""
    torch.manual_seed(0)
    model = Detector(lab.pretrain(0))
    statistics(model, train[0][:256])
    package.turn_on(model.to(dtype), mode)
    train, test = (train[0].to(dtype), train[1]), (test[0].to(dtype), test[1])
    saved = lab.saved_bytes(model, train[0][:32], partial(loss_of, targets=train[1][:32]))
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=RATE, momentum=0.9
    )
    losses, times = [], []
    for epoch in range(epochs):
        for x, y in lab.batches(train, BATCH, epoch):
            start = time.perf_counter()
            optimizer.zero_grad()
            loss = loss_of(model(x), y)
            loss.backward()
            optimizer.step()
            times.append(time.perf_counter() - start)
            losses.append(loss.item())
    return {
        "losses": losses,
        "f1": f1(model, *test),
        "saved_bytes": saved,
        "step_ms": round(1e3 * sorted(times)[len(times) // 2], 2),
        "fused": sum(r.code.rewritten for r in package.decisions(model)),
    }


def largest_difference(runs: dict[str, dict[str, Any]]) -> float:
    both = zip(runs["eval"]["losses"], runs["tune"]["losses"], strict=True)
    return max(abs(a - b) for a, b in both)


def run() -> lab.Found:
    train, test = scenes(SCENES, 0, True), scenes(128, 1, False)
    modes: tuple[Literal["eval", "tune"], ...] = ("eval", "tune")
    runs: dict[str, dict[str, Any]] = {
        m: train_detector(m, train, test, torch.float32, EPOCHS) for m in modes
    }
    # In float64, where rounding does not add up to something visible.
    exact: dict[str, dict[str, Any]] = {
        m: train_detector(m, train, test, torch.float64, 2) for m in modes
    }
    summary = {
        **{m: {k: v for k, v in r.items() if k != "losses"} for m, r in runs.items()},
        "largest_loss_difference": largest_difference(runs),
        "largest_loss_difference_float64_2_epochs": largest_difference(exact),
    }
    fig, axes = lab.figure(2, "Detection of digits in scenes, first stages frozen")
    for mode, style in (("eval", "-"), ("tune", "--")):
        axes[0].plot(runs[mode]["losses"], style, label=mode)
    axes[0].set(xlabel="step", ylabel="loss")
    axes[0].legend()
    axes[1].bar(list(runs), [r["saved_bytes"] / 1e6 for r in runs.values()])
    axes[1].set(ylabel="MB saved for backward, batch 32")
    return {"summary": summary, "runs": runs}, fig


def statistics(model: nn.Module, images: Tensor) -> None:
    """Running statistics of scenes, which are mostly background, for the new norm and the old."""
    model.train()
    with torch.no_grad():
        for part in images.split(64):
            model(part)
    model.eval()
