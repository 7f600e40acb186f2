"""Errors of the folded forward beside eval mode's own, against float64.

    python -m bench forward-error [--seeds N] [--offset MEAN] [--forward auto] [--case NAME ...]

Real Inductor code on CPU. Each case is compiled as written and with ``forward="fold"`` (or
``"auto"``), once per precision; weights, statistics and inputs are then drawn in place for every
seed. The reference is the same module in float64 with the same (rounded) values. An error is the
largest of an element, relative to the largest element of the output. Means over the seeds are
compared: the error of one seed may happen to be small in either mode.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import convbn_inductor_pass as cbn
from convbn_inductor_pass import testing

from .libraries import require
from .models.repvgg import RepVGG

__all__ = ["CASES", "PRECISIONS", "Errors", "draw", "measure"]

PRECISIONS = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "bf16-autocast": (torch.float32, True),
    "float16": (torch.float16, False),
}


Case = tuple[Callable[[], nn.Module], tuple[int, ...]]


def _block(*parts: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(make() for make in parts))


_LAYERS: dict[str, Case] = {
    "1x1": (
        _block(lambda: nn.Conv2d(64, 64, 1), lambda: nn.BatchNorm2d(64)),
        (2, 64, 14, 14),
    ),
    "3x3, ReLU": (
        _block(lambda: nn.Conv2d(32, 64, 3), lambda: nn.BatchNorm2d(64), nn.ReLU),
        (2, 32, 16, 16),
    ),
    "grouped, SiLU": (
        _block(lambda: nn.Conv2d(32, 64, 3, groups=8), lambda: nn.BatchNorm2d(64), nn.SiLU),
        (2, 32, 16, 16),
    ),
    "depthwise": (
        _block(lambda: nn.Conv2d(64, 64, 3, groups=64), lambda: nn.BatchNorm2d(64)),
        (2, 64, 16, 16),
    ),
    "transposed": (
        _block(lambda: nn.ConvTranspose2d(32, 16, 4, 2), lambda: nn.BatchNorm2d(16)),
        (2, 32, 8, 8),
    ),
    "1-d": (
        _block(lambda: nn.Conv1d(32, 64, 3), lambda: nn.BatchNorm1d(64)),
        (2, 32, 64),
    ),
    "linear": (
        _block(lambda: nn.Linear(128, 64), lambda: nn.BatchNorm1d(64)),
        (64, 128),
    ),
}


class Small(nn.Module):
    """Residual blocks, then a classifier."""

    def __init__(self, width: int = 16, depth: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
                *(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)),
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        for block in self.blocks:
            x = (x + block(x)).relu()
        return self.head(x.mean((2, 3)))


def _torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(require("torchvision.models"), name)()


CASES: dict[str, Case] = {
    **_LAYERS,
    "small ResNet": (Small, (2, 3, 16, 16)),
    "small RepVGG": (lambda: RepVGG((16, 32, 48, 64), (1, 2, 3, 1), classes=10), (2, 3, 64, 64)),
    "resnet18": (_torchvision("resnet18"), (2, 3, 64, 64)),
    "mobilenet_v2": (_torchvision("mobilenet_v2"), (2, 3, 64, 64)),
}


def draw(model: nn.Module, shape: tuple[int, ...], seed: int, offset: float = 0) -> Tensor:
    """Draw weights and statistics in place; returns an input, of mean ``offset``.

    Output channels of a layer have gains that differ by factors of e, which the batch norm after
    it takes back: its statistics are those of the input, so that activations stay of the order
    of one through a network.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    wide = copy.deepcopy(model).double()
    x = normal(*shape) + offset
    for module in wide.modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            weight = module.weight
            gain = normal(weight.shape[0]).exp().view(-1, *[1] * (weight.ndim - 1))
            weight.data.copy_(normal(*weight.shape) * gain / weight[0].numel() ** 0.5)
            if module.bias is not None:
                module.bias.data.copy_(normal(*module.bias.shape))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.weight.data.copy_(normal(*module.weight.shape) * 0.3 + 1)
            module.bias.data.copy_(normal(*module.bias.shape) * 0.3)
            module.momentum = 1.0
    with torch.no_grad():
        wide.train()(x)
        drawn = wide.state_dict().values()
        for mine, other in zip(model.state_dict().values(), drawn, strict=True):
            mine.copy_(other)
    model.eval()
    return x.to(next(model.parameters()).dtype)


@dataclasses.dataclass(frozen=True)
class Errors:
    """Errors of one case and precision, one for each seed, relative to the largest output.

    Those of ``forward="exact"``, which is eval mode, and of another value.
    """

    exact: tuple[float, ...]
    folded: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Of the means over the seeds."""
        return statistics.fmean(self.folded) / statistics.fmean(self.exact)

    @property
    def ratios(self) -> list[float]:
        """Seed by seed."""
        return [f / e for e, f in zip(self.exact, self.folded, strict=True)]


def measure(
    case: str,
    precision: str,
    seeds: int,
    offset: float = 0,
    backend: Any = "inductor",
    forward: str = "fold",
) -> Errors:
    """Run a case in a precision, with ``forward`` beside ``"exact"``."""
    make, shape = CASES[case]
    dtype, autocast = PRECISIONS[precision]
    context: Any = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    found: dict[str, list[float]] = {"exact": [], forward: []}
    for way, errors in found.items():
        torch.manual_seed(0)
        model = make().to(dtype)
        with testing.fresh_compile(), cbn.options(forward=way), torch.no_grad():
            compiled = torch.compile(model, backend=backend)
            for seed in range(seeds):
                x = draw(model, shape, seed, offset)
                exact = copy.deepcopy(model).double()(x.double())
                with context:
                    out = compiled(x)
                errors.append(((out.double() - exact).abs().max() / exact.abs().max()).item())
    return Errors(tuple(found["exact"]), tuple(found[forward]))


HEADER = ("case", "precision", "eval", "folded", "ratio", "least and most of a seed")
