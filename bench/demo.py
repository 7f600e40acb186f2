"""The demonstration: fine-tune a small ResNet in eval mode and in tune mode, and compare.

A ResNet learns the handwritten digits 0 to 4 in train mode, which gives its batch norms
statistics and weights that differ from channel to channel. It gets a new head, and two copies
of it are fine-tuned on the digits 5 to 9 with batch norms in eval mode, both compiled by
Inductor, on the same batches: one with the pass off (eval mode), one with it on (tune mode).
Then adversarial examples are made against the second copy, whose weights are frozen for it.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import statistics
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from convbn_inductor_pass.explanation import explain
from convbn_inductor_pass.saved_tensors import saved_for_backward

__all__ = ["Result", "SmallResNet", "run", "small_resnet"]

_PRETRAIN_STEPS = 60
_WARM_UP = 3  # Steps whose time does not count: the first compiles, the next ones fill caches.


class _Block(nn.Module):
    """Two 3x3 convolutions with batch norms, and a shortcut around them."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """A ResNet with basic blocks (He et al., 2015) for small images.

    Takes [N, 1, H, W], returns logits [N, classes].
    """

    def __init__(self, classes: int = 10, width: int = 16, stages: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        widths = [width * 2**i for i in range(stages)]
        blocks = [_Block(width, width, stride=1)]
        blocks += [_Block(narrow, wide, stride=2) for narrow, wide in itertools.pairwise(widths)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def small_resnet() -> SmallResNet:
    """The demonstration's network, for ``explain bench.demo:small_resnet``."""
    return SmallResNet()


class _Digits(NamedTuple):
    images: Tensor  # [N, 1, 8, 8], zero mean, unit variance
    labels: Tensor  # [N]

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        # On the CPU, so that every device draws the same batches.
        index = torch.randint(len(self.labels), (size,), generator=generator)
        index = index.to(self.labels.device)
        return self.images[index], self.labels[index]

    def only(self, first: int, last: int) -> _Digits:
        wanted = (self.labels >= first) & (self.labels <= last)
        return _Digits(self.images[wanted], self.labels[wanted])


def _load_digits(device: torch.device) -> _Digits:
    """8x8 handwritten digits of the UCI repository, which scikit-learn ships."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32, device=device).unsqueeze(1)
    labels = torch.tensor(data.target, dtype=torch.long, device=device)
    return _Digits((images - images.mean()) / images.std(), labels)


class _FineTuning:
    """One copy of the network under fine-tuning with batch norms in eval mode."""

    def __init__(self, pretrained: nn.Module, *, tune: bool) -> None:
        self.model = copy.deepcopy(pretrained)
        # Not by the global flag: Dynamo does not guard on it, and one copy might run the other's
        # code.
        self.forward = torch.compile(self.model, options={"efficient_conv_bn_eval_fx_passes": tune})
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.02, momentum=0.9)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.saved_bytes = 0

    def step(self, images: Tensor, labels: Tensor) -> None:
        start = self._now(images.device)
        self.optimizer.zero_grad()
        logits = self.forward(images)
        self.saved_bytes = _saved_bytes(logits, self.model, images)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(self._now(images.device) - start)

    def _now(self, device: torch.device) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    @torch.no_grad()
    def accuracy(self, digits: _Digits) -> float:
        predicted = self.model(digits.images).argmax(1)
        return (predicted == digits.labels).float().mean().item()


def _saved_bytes(output: Tensor, model: nn.Module, images: Tensor) -> int:
    """Bytes that the compiled forward really holds for backward, beside what is alive anyway."""
    alive = {t.data_ptr() for t in (*model.parameters(), *model.buffers(), images)}
    tensors = [t for t in getattr(output.grad_fn, "saved_tensors", ()) if t is not None]
    return sum(t.nbytes for t in tensors if t.data_ptr() not in alive)


@dataclasses.dataclass(frozen=True)
class Result:
    """What the demonstration found; dictionaries are by mode.

    Attributes:
        fused, batch_norms: how many of the network's batch norms are in tune mode.
        saved_bytes: new bytes saved for backward as predicted; "builtin" is PyTorch's own pass.
        measured_bytes: the same of the two modes that ran, counted on what autograd held.
        losses: first and last loss.
        loss_difference: largest difference of the losses of a step between the modes.
        accuracy: on all images of the new digits after the last step.
        frozen_bytes: the same as ``saved_bytes`` where only batch norms are trained
            ("BN-tuning"), and where only the input has a gradient ("adversarial example").
        accuracy_attacked: accuracy on adversarial examples.
        time_ratio: a step's time in tune mode over that of the same step in eval mode, run
            right before or after it; the median of the steps after the first three (which
            compile and fill caches), None if there are none.
    """

    fused: int
    batch_norms: int
    saved_bytes: dict[str, int]
    measured_bytes: dict[str, int]
    losses: dict[str, tuple[float, float]]
    loss_difference: float
    accuracy: dict[str, float]
    frozen_bytes: dict[str, dict[str, int]]
    accuracy_attacked: float
    time_ratio: float | None

    def table(self) -> Table:
        """The closing table."""
        table = Table(
            title="Fine-tuning with batch norms in eval mode",
            title_justify="left",
            caption="Built-in is PyTorch's own pass; deploy, batch norms merged for good. Time:\n"
            "median ratio of interleaved steps here, without compilation.",
            caption_justify="left",
        )
        table.add_column("", no_wrap=True)
        columns = {"eval": "eval", "builtin": "built-in", "tune": "tune", "deploy": "deploy"}
        for column in columns.values():
            table.add_column(column, justify="right", no_wrap=True)

        def row(name: str, values: dict[str, str]) -> None:
            table.add_row(name, *(values.get(mode, "") for mode in columns))

        ratio = "too few steps" if self.time_ratio is None else f"{self.time_ratio:.3f}"
        row("batch norms in tune mode", {"tune": f"{self.fused} of {self.batch_norms}"})
        row("bytes saved for backward", {m: f"{b:,}" for m, b in self.saved_bytes.items()})
        row("  measured", {m: f"{b:,}" for m, b in self.measured_bytes.items()})
        row("loss, first step", {m: f"{first:.6f}" for m, (first, _) in self.losses.items()})
        row("loss, last step", {m: f"{last:.6f}" for m, (_, last) in self.losses.items()})
        row("  largest difference", {"tune": f"{self.loss_difference:.1e}"})
        row("accuracy", {m: f"{a:.1%}" for m, a in self.accuracy.items()})
        row("time of a step", {"eval": "1", "tune": ratio})
        for name, sizes in self.frozen_bytes.items():
            row(f"bytes saved, {name}", {m: f"{b:,}" for m, b in sizes.items()})
        row("accuracy under attack", {"tune": f"{self.accuracy_attacked:.1%}"})
        return table


def _pretrain(digits: _Digits, generator: torch.Generator, batch_size: int) -> SmallResNet:
    """A network that knows these digits, with a new head, in eval mode."""
    # Channels last, as Inductor would lay the weights out anyway: else it keeps copies of them
    # for backward, in every mode.
    model = SmallResNet().to(digits.images.device)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(_PRETRAIN_STEPS):
        images, labels = digits.batch(batch_size, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    model.head.reset_parameters()
    return model.eval()


def _attacked(fine_tuned: _FineTuning, digits: _Digits) -> Tensor:
    """Adversarial examples: each pixel moved by 0.3 along the sign of the loss's gradient."""
    fine_tuned.model.requires_grad_(False)
    images = digits.images.clone().requires_grad_()
    F.cross_entropy(fine_tuned.forward(images), digits.labels).backward()
    if images.grad is None:
        raise AssertionError("the input has no gradient")
    return images.detach() + 0.3 * images.grad.sign()


def run(
    *,
    steps: int = 40,
    batch_size: int = 128,
    device: str = "cpu",
    seed: int = 0,
    console: Console | None = None,
) -> Result:
    """Run the demonstration; progress goes to ``console`` (standard error by default).

    Raises:
        ImportError: scikit-learn, whose digits are the data, is not installed.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    digits = _load_digits(torch.device(device))
    new_digits = digits.only(5, 9)
    with Progress(console=console or Console(stderr=True)) as progress:
        task = progress.add_task("pretraining in train mode", total=steps + 3)
        pretrained = _pretrain(digits.only(0, 4), generator, batch_size)
        images, labels = new_digits.batch(batch_size, generator)

        progress.update(task, description="predicting saved bytes", advance=1)
        explanation = explain(pretrained, images)
        builtin = saved_for_backward(pretrained, images, mode="builtin").new_bytes
        progress.advance(task)

        by_eval, by_tune = (_FineTuning(pretrained, tune=tune) for tune in (False, True))
        progress.update(task, description="compiling both modes")
        for step in range(steps):
            # Interleaved, and in turns, so that whatever slows this machine down hits both.
            for each in (by_eval, by_tune) if step % 2 else (by_tune, by_eval):
                each.step(images, labels)
            progress.update(task, description="fine-tuning", advance=1)
            images, labels = new_digits.batch(batch_size, generator)
        accuracy = {
            mode: each.accuracy(new_digits) for mode, each in (("eval", by_eval), ("tune", by_tune))
        }
        progress.update(task, description="adversarial examples", advance=1)
        attacked = _Digits(_attacked(by_tune, new_digits), new_digits.labels)
        bn_tuning = explain(pretrained, images, freeze=["*"], train_bn=True)
        adversarial = explain(by_tune.model, images.clone().requires_grad_())
        progress.update(task, description="done")

    modes = {"eval": by_eval, "tune": by_tune}
    seconds = zip(by_tune.seconds[_WARM_UP:], by_eval.seconds[_WARM_UP:], strict=True)
    ratios = [a / b for a, b in seconds]
    losses = zip(by_eval.losses, by_tune.losses, strict=True)
    return Result(
        fused=explanation.fused,
        batch_norms=len(explanation.batch_norms),
        saved_bytes={**explanation.saved_bytes, "builtin": builtin},
        measured_bytes={mode: each.saved_bytes for mode, each in modes.items()},
        losses={mode: (each.losses[0], each.losses[-1]) for mode, each in modes.items()},
        loss_difference=max(abs(a - b) for a, b in losses),
        accuracy=accuracy,
        frozen_bytes={
            "BN-tuning": bn_tuning.saved_bytes,
            "adversarial": adversarial.saved_bytes,
        },
        accuracy_attacked=by_tune.accuracy(attacked),
        time_ratio=statistics.median(ratios) if ratios else None,
    )
