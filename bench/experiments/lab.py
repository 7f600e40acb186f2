"""What the experiments share: the data, a small residual network, training, results, plots.

Data: scikit-learn's handwritten digits, 1,797 images of 8x8 pixels, inside its package. A
network is pretrained in train mode on the digits 0-4 (901 images) and transferred to 5-9 (896
images, 70% for training). CPU, float32, seeds fixed.
"""

from __future__ import annotations

import copy
import json
import math
import pathlib
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convbn_inductor_pass as package

Split = tuple[Tensor, Tensor]
Found = tuple[dict[str, Any], Any]  # a result, which has a "summary", and a figure


class Block(nn.Module):
    """Two 3x3 convolutions with batch norms and a shortcut."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.down = nn.Sequential(
            nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.down(x), inplace=True)


class Net(nn.Module):
    """Stem, three blocks, a classifier: 10 conv-BN pairs. Returns logits [N, classes]."""

    def __init__(self, width: int = 16, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        self.blocks = nn.Sequential(
            Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2)
        )
        self.head = nn.Linear(4 * width, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.blocks(F.relu(self.stem(x), inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def digits(low: int, high: int, seed: int = 0, train: float = 0.7) -> tuple[Split, Split]:
    """Train and test split of the digits ``low`` to ``high``, labels from 0."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target)
    chosen = ((labels >= low) & (labels <= high)).nonzero()[:, 0]
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))]
    x, y = images[chosen], labels[chosen] - low
    cut = int(train * len(x))
    return (x[:cut], y[:cut]), (x[cut:], y[cut:])


def batches(split: Split, size: int, seed: int) -> Iterator[Split]:
    """Shuffled batches; the same for the same seed."""
    x, y = split
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    for i in range(0, len(x) - size + 1, size):
        yield x[order[i : i + size]], y[order[i : i + size]]


def accuracy(model: nn.Module, split: Split) -> float:
    """Share of right answers; puts nothing in another mode."""
    with torch.no_grad():
        return (model(split[0]).argmax(1) == split[1]).float().mean().item()


def pretrain(seed: int, epochs: int = 15, lr: float = 0.1, weight_decay: float = 5e-4) -> Net:
    """A network trained in train mode on the digits 0-4, in evaluation mode."""
    torch.manual_seed(seed)
    model = Net().train()
    train, _ = digits(0, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        for x, y in batches(train, 32, epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


def in_mode(model: Net, mode: str, seed: int = 0) -> Net:
    """A copy in one of the modes with a new classifier."""
    model = copy.deepcopy(model)
    torch.manual_seed(seed)
    model.head.reset_parameters()
    example = digits(5, 9)[0][0][:2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deploy mode's, which is what we are here to see
        package.turn_on(model, mode, example_inputs=(example,) if mode == "deploy" else None)  # type: ignore[arg-type]
    return model


def fine_tune(
    model: nn.Module,
    train: Split,
    *,
    lr: float,
    epochs: int,
    batch: int = 32,
    momentum: float = 0.9,
    parameters: list[nn.Parameter] | None = None,
) -> dict[str, Any]:
    """Train with SGD; losses of all steps and the median time of a step. Stops at NaN."""
    optimizer = torch.optim.SGD(
        list(model.parameters()) if parameters is None else parameters, lr=lr, momentum=momentum
    )
    losses: list[float] = []
    times: list[float] = []
    for epoch in range(epochs):
        for x, y in batches(train, batch, epoch):
            start = time.perf_counter()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            times.append(time.perf_counter() - start)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                return {"losses": losses, "step_seconds": sorted(times)[len(times) // 2]}
    return {"losses": losses, "step_seconds": sorted(times)[len(times) // 2]}


def saved_bytes(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> int:
    """Bytes saved for backward by ``loss(model(x))``, each storage once, without parameters."""
    alive = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = loss(model(x))
    del out
    return sum(t.untyped_storage().nbytes() for p, t in saved.items() if p not in alive)


def figure(columns: int, title: str) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, columns, figsize=(5 * columns, 3.6), squeeze=False)
    fig.suptitle(title, fontsize=11)
    return fig, axes[0]


def write(name: str, result: dict[str, Any], fig: Any, out: pathlib.Path, started: float) -> None:
    """``name.json`` with machine and versions, and ``name.png``; says what the result shows."""
    out.mkdir(parents=True, exist_ok=True)
    where = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "seconds": round(time.time() - started, 1),
    }
    text = json.dumps({"experiment": name, **where, **result}, indent=1)
    (out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    fig.tight_layout()
    fig.savefig(out / f"{name}.png", dpi=110)
    print(json.dumps(result["summary"], indent=1))
    print(f"{where['seconds']} s; wrote {out / name}.json and .png")
