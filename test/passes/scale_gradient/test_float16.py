"""float16: what is finite in eval mode is finite, and the scale's gradient is no less exact."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import PassRecorder, relative_error
from torch import Tensor, nn

from convbn_inductor_pass import Code, testing

GAMMAS = (0.0, 1e-4, 1e-3, 1.0, 100.0, 6e4)
VARIANCES = (1e-9, 1e-2, 1.0, 1e6)
LOSS_SCALES = (1.0, 2.0**10, 2.0**20)
CELLS = [*itertools.product(GAMMAS, VARIANCES, LOSS_SCALES)]
TOLERANCE = 1e-3  # two roundings to float16


@dataclasses.dataclass(frozen=True)
class Setting:
    """Dtypes of the layer's tensors and of the batch norm's, and whether autocast casts."""

    layer: torch.dtype
    batch_norm: torch.dtype
    autocast: bool = False

    def ambient(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast:
            return torch.autocast("cpu", torch.float16)
        return contextlib.nullcontext()


SETTINGS = {
    "layer": Setting(torch.float16, torch.float32),
    "layer and batch norm": Setting(torch.float16, torch.float16),
    "autocast": Setting(torch.float32, torch.float32, autocast=True),
}
NAMES = ("x", "w", "b", "g", "beta", "m", "v")


def conv_bn(x, w, b, g, beta, m, v):
    return F.batch_norm(F.conv2d(x, w, b, padding=1), m, v, g, beta)


def linear_bn(x, w, b, g, beta, m, v):
    rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    return F.batch_norm(F.linear(rows, w[:, :, 0, 0], b), m, v, g, beta)


def made(setting: Setting, gamma: float, variance: float) -> dict[str, Tensor]:
    """Arguments; the scales of the four channels differ in sign and by up to a factor of four."""
    generator = torch.Generator().manual_seed(0)
    x, w, b, beta, m = (
        torch.randn(shape, generator=generator)
        for shape in ((2, 3, 28, 28), (4, 3, 3, 3), (4,), (4,), (4,))
    )
    g = gamma * torch.tensor([1.0, -0.5, 0.25, 1.0])
    v = torch.full((4,), variance)
    values = (x, w / 5, b / 10, g, beta, m / 10, v)
    dtypes = [setting.layer] * 3 + [setting.batch_norm] * 4
    arguments = {n: t.to(d) for n, t, d in zip(NAMES, values, dtypes, strict=True)}
    for name in ("x", "w", "b", "g", "beta"):
        arguments[name].requires_grad_()
    return arguments


def gradients(
    fn: Callable[..., Tensor], arguments: dict[str, Tensor], loss_scale: float
) -> dict[str, Tensor]:
    """Gradients of a mean over all elements, times ``loss_scale``."""
    out = fn(*arguments.values())
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(out.shape, generator=generator) * (loss_scale / out.numel())
    # As a loss in float32 gives it to what computes in float16.
    out.backward(weights.half().to(out.dtype))
    return {n: t.grad for n, t in arguments.items() if t.grad is not None}


@functools.cache
def grid(
    name: str, fn: Callable[..., Tensor]
) -> dict[tuple[float, float, float], tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Gradients of tune mode and of eval mode by cell: compiled once, for all cells."""
    setting, runs = SETTINGS[name], []
    for backend in (recorder := PassRecorder(), testing.fast_backend(fuse=False)):
        torch._dynamo.reset()
        compiled = torch.compile(fn, backend=backend, dynamic=False)
        with setting.ambient():
            runs.append([gradients(compiled, made(setting, *c[:2]), c[2]) for c in CELLS])
    assert recorder.codes == [Code.FUSED]
    return dict(zip(CELLS, zip(*runs, strict=True), strict=True))


def finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def finite_cells(name: str, fn: Callable[..., Tensor]) -> dict[Any, Any]:
    """The cells of the grid in which eval mode's gradients are finite."""
    return {c: runs for c, runs in grid(name, fn).items() if all(map(finite, runs[1].values()))}


@pytest.mark.parametrize("fn", [conv_bn, linear_bn])
@pytest.mark.parametrize("name", SETTINGS)
class TestGrid:
    def test_finite(self, name, fn):
        """Where eval mode's gradients are, all of them: else a gradient scaler skips the step."""
        cells = finite_cells(name, fn)
        lost = [(c, n) for c, (tune, _) in cells.items() for n in tune if not finite(tune[n])]
        assert not lost
        assert len(cells) > len(CELLS) / 2

    def test_gradient_of_scale(self, name, fn):
        setting, errors = SETTINGS[name], {}
        for cell, (tune, _) in finite_cells(name, fn).items():
            doubles = {
                # As autocast rounds them.
                n: (t.half() if setting.autocast and n in "xwb" else t).detach().double()
                for n, t in made(setting, *cell[:2]).items()
            }
            doubles["g"].requires_grad_()
            exact = gradients(fn, doubles, cell[2])["g"]
            errors[cell] = relative_error(tune["g"], exact)
        assert max(errors.values()) <= TOLERANCE, errors


class ZeroInitialized(nn.Module):
    """A residual block whose last batch norm starts at zero, as is usual in ResNets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.bns = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.head = nn.Linear(8, 4)
        nn.init.zeros_(self.bns[2].weight)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bns[0](self.stem(x)))
        y = F.relu(self.bns[1](self.convs[0](x)))
        x = F.relu(x + self.bns[2](self.convs[1](y)))
        return self.head(x.mean((2, 3)))


def test_training_with_a_gradient_scaler():
    """It skips steps whose gradients are not finite: in tune mode no more than in eval mode."""
    skipped = {}
    for fuse in (False, True):
        torch.manual_seed(0)
        model, x = ZeroInitialized(), torch.randn(8, 3, 28, 28) * 4
        target = torch.arange(8) % 4
        compiled = torch.compile(model, backend=testing.fast_backend(fuse=fuse))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=3)
        skipped[fuse] = 0
        for _ in range(24):
            with torch.autocast("cpu", torch.float16):
                loss = F.cross_entropy(compiled(x), target)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            before = scaler.get_scale()
            scaler.update()
            skipped[fuse] += scaler.get_scale() < before
        assert model.bns[2].weight.abs().min() > 0
        torch._dynamo.reset()
    assert 0 < skipped[True] <= skipped[False] < 24
