"""Hooks of modules and checkpoints: what they are shown, what they change."""

import gc
import io

import pytest
import torch
import torch.nn.functional as F
from common import Residual, spread_statistics
from eager_helpers import Fn, codes, run
from eager_models import conv_bn
from torch import nn
from torch.utils.checkpoint import checkpoint

from convbn_inductor_pass import Code, turn_on


def test_hooks_see_tensors_and_gradients():
    model, x = Residual(), torch.randn(2, 3, 8, 8)
    stored = {}

    def store(module, args, output):
        output.retain_grad()
        stored["conv"] = output
        output.register_hook(lambda g: stored.update(grad=g))

    def observe():
        stored.clear()
        model(x).sum().backward()
        return stored["conv"].detach().clone(), stored["conv"].grad, stored["grad"]

    model.convs[1].register_forward_hook(store)
    model.bns[0].register_forward_hook(lambda m, a, out: out * 2)
    expected = observe()
    turn_on(model)
    for _ in range(2):
        for a, b in zip(observe(), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert codes(model).count(Code.FUSED) == Residual.pairs - 1


@pytest.mark.parametrize("kind", ["pre", "forward", "reads", "backward_pre", "backward"])
def test_hooks_of_a_batch_norm(kind):
    """What they change counts, and what they are shown is what eval mode shows them."""
    model, x = Fn(lambda m, x: m.bn(m.conv(x)).relu()), torch.randn(2, 4, 6, 6)
    bn, seen = model.bn, []

    def reads(module, args, output):
        seen.extend((args[0].mean(), output.mean()))

    def backward(module, into, outof):
        seen.append(outof[0].sum())
        return tuple(None if g is None else 3 * g for g in into)

    register = {
        "pre": lambda: bn.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
        "forward": lambda: bn.register_forward_hook(lambda m, args, output: output + 1),
        "reads": lambda: bn.register_forward_hook(reads),
        "backward_pre": lambda: bn.register_full_backward_pre_hook(lambda m, g: (g[0] * 2,)),
        "backward": lambda: bn.register_full_backward_hook(backward),
    }
    register[kind]()
    expected, gradients = run(model, x)
    shown = len(seen)
    turn_on(model)
    for _ in range(2):
        got, tune_gradients = run(model, x)
        torch.testing.assert_close(got, expected)
        for n, g in gradients.items():
            torch.testing.assert_close(tune_gradients[n], g, rtol=1e-4, atol=1e-4)
    assert len(seen) == 3 * shown
    for i, value in enumerate(seen):
        torch.testing.assert_close(value + 0, seen[i % shown])
    assert codes(model).count(Code.FUSED) == (1 if kind == "forward" else 0)


def test_feature_extractor_that_holds_a_convolution_output():
    model, x = Residual(), torch.randn(2, 3, 8, 8)
    stored = []
    model.stem.register_forward_hook(lambda m, a, out: stored.append(out))
    model(x)
    turn_on(model)
    for _ in range(2):
        model(x)
    with torch.no_grad():
        model.stem.weight.zero_()  # too late for what was computed before
    for c in stored[1:]:
        assert torch.equal(c + 0, stored[0])
    torch.save(stored, io.BytesIO())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("how", ["module", "pair", "closure", "part", "norm_only"])
def test_checkpoint(reentrant, how):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.pair = conv_bn(4, 4, 3), conv_bn(4, 4, 3, act=None)
            self.conv, self.tail = nn.Conv2d(4, 4, 3), conv_bn(4, 4)
            self.norm = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())

        def forward(self, x):
            def closure(y):
                return F.relu(self.block[1](self.block[0](y)))

            if how == "part":
                x = self.block[2](
                    self.block[1](checkpoint(self.block[0], x, use_reentrant=reentrant))
                )
            else:
                block = {"module": self.block, "pair": self.pair}.get(how, closure)
                x = checkpoint(block, x, use_reentrant=reentrant)
            x = self.conv(x)
            if how == "norm_only":
                x = checkpoint(self.norm, x, use_reentrant=reentrant)
            else:
                x = self.norm(x)
            return self.tail(x)

    model = spread_statistics(Model()).eval()
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    expected, gradients = run(model, x)
    turn_on(model)
    for _ in range(2):
        got, tune_gradients = run(model, x)
        torch.testing.assert_close(got, expected)
        for n, g in gradients.items():
            torch.testing.assert_close(tune_gradients[n], g, rtol=1e-4, atol=1e-4)
    assert codes(model).count(Code.FUSED) >= (1 if how == "norm_only" else 2)


def test_interrupt_leaves_nothing_behind():
    stop = [KeyboardInterrupt]

    def forward(m, x):
        c = m.conv(x)
        if stop:
            raise stop.pop()
        return m.bn(c)

    model, x = Fn(forward), torch.randn(2, 4, 6, 6)
    turn_on(model)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    assert type(F.conv2d(x, model.conv.weight)) is torch.Tensor
    model(x)
    assert codes(model) == [Code.FUSED]
    stop.append(ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        model(x)
    assert torch.overrides._get_current_function_mode() is None
    assert type(model.conv(x)) is torch.Tensor


@pytest.mark.parametrize("forget", ["turn_on", "gone"])
def test_interrupted_model_is_forgotten_by_others(forget):
    """Its region would take what other models do for its own."""

    def interrupted(m, x):
        m.conv(x)
        raise KeyboardInterrupt

    x, other = torch.randn(2, 4, 6, 6), Fn(lambda m, x: m.bn(m.conv(x)))
    if forget == "gone":
        turn_on(other)
    model = turn_on(Fn(interrupted))
    with pytest.raises(KeyboardInterrupt):
        model(x)
    if forget == "gone":
        del model
        gc.collect()
    else:
        turn_on(other)
    other(x)
    assert codes(other) == [Code.FUSED]
    assert torch.overrides._get_current_function_mode() is None


@pytest.mark.parametrize("around", ["nothing", "an error being handled"])
def test_a_forward_that_returns_nothing(around):
    def forward(m, x):
        m.function.last = m.bn(m.conv(x))

    model, x = Fn(forward), torch.randn(2, 4, 6, 6)
    turn_on(model)
    try:
        raise ValueError(around)
    except ValueError:
        if around != "nothing":
            model(x)
    if around == "nothing":
        model(x)
    assert codes(model) == [Code.FUSED]
    model.function.last.sum().backward()
    assert model.bn.weight.grad is not None
