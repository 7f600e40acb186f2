"""Checkpointed functions and blocks, reentrant or not: gradients are eval mode's, codes true."""

import pytest
import torch
import torch.nn.functional as F
from common import spread_statistics
from eager_helpers import codes, run
from eager_models import conv_bn
from torch import nn
from torch.utils.checkpoint import checkpoint

from convbn_inductor_pass import Code, turn_on


class Block(nn.Module):
    """A block that checkpoints a function of its own."""

    def __init__(self, how, reentrant):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.how, self.reentrant = how, reentrant

    def forward(self, x):
        return checkpoint(getattr(self, self.how), x, use_reentrant=self.reentrant)

    def modules_called(self, x):
        return F.relu(self.bn(self.conv(x)))

    def functions_called(self, x):
        bn = self.bn
        c = F.conv2d(x, self.conv.weight, padding=1)
        return F.batch_norm(c, bn.running_mean, bn.running_var, bn.weight, bn.bias).relu()

    def ends_with_norm(self, x):
        return self.bn(self.conv(x))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("how", ["modules_called", "functions_called", "ends_with_norm"])
def test_function(how, reentrant):
    """It is recomputed where no module is called that could open a region: as written, both."""
    model = spread_statistics(nn.Sequential(Block(how, reentrant), Block(how, reentrant))).eval()
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    expected, gradients = run(model, x)
    turn_on(model)
    for _ in range(2):
        with torch.profiler.profile() as profile:
            got, tune_gradients = run(model, x)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        torch.testing.assert_close(tune_gradients, gradients)
        names = [e.name for e in profile.events()]
        assert names.count("aten::native_batch_norm_backward") == 2
        assert codes(model) == [Code.NO_GRAD if reentrant else Code.REGION] * 2


class Residual(nn.Module):
    def __init__(self, reentrant, inner):
        super().__init__()
        self.layers = nn.Sequential(conv_bn(4, 6, act=nn.ReLU6), conv_bn(6, 4, act=None))
        self.reentrant, self.inner = reentrant, inner

    def forward(self, x):
        if self.inner:  # a checkpoint in a checkpoint
            return x + checkpoint(self.layers, x, use_reentrant=self.reentrant)
        return x + self.layers(x)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["residual", "nested", "pair"])
def test_module(kind, reentrant):
    def block():
        if kind == "pair":
            return conv_bn(4, 4, act=None)
        return Residual(reentrant, inner=kind == "nested")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(block() for _ in range(2))

        def forward(self, x):
            for b in self.blocks:
                x = checkpoint(b, x, use_reentrant=reentrant)
            return x

    model = spread_statistics(Net()).eval()
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    expected, gradients = run(model, x)
    turn_on(model)
    for _ in range(2):
        with torch.profiler.profile() as profile:
            got, tune_gradients = run(model, x)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        torch.testing.assert_close(tune_gradients, gradients, rtol=1e-4, atol=1e-5)
        names = [e.name for e in profile.events()]
        assert names.count("aten::native_batch_norm_backward") == 0
        assert codes(model) == [Code.FUSED] * (2 if kind == "pair" else 4)


class UsesOutput(nn.Module):
    """A pair whose layer's output is needed by more than the batch norm."""

    def __init__(self, use):
        super().__init__()
        self.conv, self.bn, self.use = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), use

    def forward(self, x):
        c = self.conv(x)
        y = self.bn(c)
        if self.use == "stored":
            self.c = c
        elif self.use == "hooked" and c.requires_grad:
            c.register_hook(lambda g: 3 * g)
        return y + c.sin() if self.use == "added" else y


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("use", ["added", "stored", "hooked"])
def test_layer_output_that_is_used(use, reentrant):
    """What the layer saved is unpacked once, though both nodes of the pair need it."""
    block = spread_statistics(UsesOutput(use)).eval()
    model = nn.Sequential(conv_bn(4, 4), block).eval()
    x = torch.randn(2, 4, 8, 8, requires_grad=True)

    def forward(x):
        return checkpoint(block, model[0](x), use_reentrant=reentrant)

    expected, gradients = run(forward, x, parameters=dict(model.named_parameters()))
    turn_on(model)
    for _ in range(2):
        got, tune_gradients = run(forward, x, parameters=dict(model.named_parameters()))
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        torch.testing.assert_close(tune_gradients, gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("unpacked", ["numpy", "copied"])
def test_others_hooks_around_it(unpacked):
    """Where NumPy owns the input in the forward, or only when it is recomputed."""

    def pack(t):
        return t.detach().numpy().copy() if unpacked == "numpy" else t.detach().clone()

    def unpack(packed):
        return torch.from_numpy(packed) if unpacked == "numpy" else packed

    block = spread_statistics(conv_bn(4, 4)).eval()
    x = torch.randn(2, 4, 8, 8)
    if unpacked == "copied":
        x = torch.from_numpy(x.numpy())

    def forward(x):
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return checkpoint(block, x, use_reentrant=False)

    parameters = dict(block.named_parameters())
    expected, gradients = run(forward, x, parameters=parameters)
    turn_on(block)
    got, tune_gradients = run(forward, x, parameters=parameters)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    torch.testing.assert_close(tune_gradients, gradients, rtol=1e-4, atol=1e-4)
