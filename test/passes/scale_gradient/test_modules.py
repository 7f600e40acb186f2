"""Modules as people write them: of every kind, subclassed, with hooks and parametrizations."""

from __future__ import annotations

import types

import pytest
import torch
from common import LAYERS, ConvBN, example_input, spread_statistics
from programs import check_model
from torch import Tensor, nn

from convbn_inductor_pass import Code


def codes_of(model: nn.Module, *inputs: Tensor) -> list[Code]:
    """Codes of the batch norms, and nothing else; results are checked on the way."""
    records = check_model(model, *inputs)
    assert {r.kind for r in records} == {"batch norm"}
    return [r.code for r in records]


@pytest.fixture(name="x")
def _x() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer(name):
    torch.manual_seed(0)
    model = ConvBN(LAYERS[name]())
    assert codes_of(model, example_input(model.layer, requires_grad=True)) == [Code.FUSED]


class StandardizedConv(nn.Conv2d):
    """Weight standardization: the weight that is used is not ``weight``."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class DoubledBatchNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class ToSize(nn.ConvTranspose2d):
    """A transposed convolution that is told its output's size."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, (18, 18))


CONVS = {
    "subclass": lambda: StandardizedConv(4, 6, 3),
    "padding_mode": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "output_size": lambda: ToSize(4, 6, 3, stride=2),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3)),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 6, 3)),
}


@pytest.mark.parametrize("name", CONVS)
def test_convolutions(x, name):
    torch.manual_seed(0)
    assert codes_of(ConvBN(CONVS[name]().eval()), x) == [Code.FUSED]


BATCH_NORMS = {
    "subclass": (DoubledBatchNorm, Code.FUSED),
    "SyncBatchNorm": (nn.SyncBatchNorm, Code.FUSED),
    "without weight": (lambda c: nn.BatchNorm2d(c, affine=False), Code.AFFINE_FROZEN),
}


@pytest.mark.parametrize("name", BATCH_NORMS)
def test_batch_norms(x, name):
    torch.manual_seed(0)
    make, code = BATCH_NORMS[name]
    model = nn.Sequential(nn.Conv2d(4, 6, 3), make(6), nn.ReLU())
    assert codes_of(spread_statistics(model).eval(), x) == [code]


def doubled(module: nn.Module, x: Tensor) -> Tensor:
    return type(module).forward(module, x) * 2


HOOKS = {
    "forward": lambda m: m.register_forward_hook(lambda m, args, out: out * 2),
    "pre": lambda m: m.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
    "forward_replaced": lambda m: setattr(m, "forward", types.MethodType(doubled, m)),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", ["layer", "bn"])
def test_hooks(x, name, hook):
    """The graph has what they do: a factor, which may be between layer and batch norm."""
    torch.manual_seed(0)
    model = ConvBN(nn.Conv2d(4, 6, 3))
    HOOKS[hook](getattr(model, name))
    records = check_model(model, x)
    assert [(r.kind, r.code) for r in records] == [("batch norm", Code.FUSED)]


def test_shared_modules(x):
    """Each call is a pair of its own, whose gradients are summed."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, padding=1)
    bn = spread_statistics(nn.BatchNorm2d(4))
    model = nn.Sequential(conv, bn, nn.ReLU(), conv, bn, nn.ReLU()).eval()
    assert codes_of(model, x) == [Code.FUSED, Code.FUSED]
