"""Fine-tuning in tune mode: frozen parts, schedules, steps, second derivatives, torch.func."""

import copy

import pytest
import torch
import torch.nn.functional as F
from common import Residual
from eager_helpers import Fn, assert_like_eval, codes
from eager_models import make
from torch import nn

import convbn_inductor_pass
from convbn_inductor_pass import Code, turn_off, turn_on


def test_training_steps_equal_evals():
    eval_model = Residual().double()
    tune_model = turn_on(copy.deepcopy(eval_model))
    losses = []
    for model in (eval_model, tune_model):
        torch.manual_seed(0)
        x, target = torch.randn(8, 3, 8, 8).double(), torch.randint(5, (8,))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses.append([])
        for _ in range(10):
            loss = F.cross_entropy(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < 0.8 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    for a, b in zip(eval_model.parameters(), tune_model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def freeze(model, what):
    for name, p in model.named_parameters():
        is_norm = "bn" in name
        p.requires_grad_(not {"norms": is_norm, "layers": not is_norm, "all": True}[what])


@pytest.mark.parametrize("what", ["norms", "layers", "all"])
def test_frozen_subsets(what):
    model = Residual()
    freeze(model, what)
    x = torch.randn(2, 3, 8, 8, requires_grad=what == "all")
    # With frozen layers, the batch norm weight's gradient would cost a convolution: as written.
    assert_like_eval(model, x, fused=0 if what == "layers" else Residual.pairs)
    if what == "layers":
        assert set(codes(model)) == {Code.LAYER_FROZEN}
        with convbn_inductor_pass.options(fuse_frozen_layers=True):
            # All but the stem, which needs no gradient of anything: nothing stands before its norm.
            assert_like_eval(turn_off(model), x, fused=Residual.pairs - 1)


def test_unfrozen_later():
    """As schedules of fine-tuning do; what was seen before does not count."""
    model, x = turn_on(Residual()), torch.randn(2, 3, 8, 8)
    freeze(model, "layers")
    for _ in range(2):
        model(x)
        assert set(codes(model)) == {Code.LAYER_FROZEN}
    model.requires_grad_(True)
    model(x)
    assert codes(model) == [Code.FUSED] * Residual.pairs
    for norm in model.bns:
        norm.train()
    for _ in range(2):
        model(x)
        assert codes(model).count(Code.BATCH_STATISTICS) == len(model.bns)
    model.eval()
    model(x)
    assert codes(model) == [Code.FUSED] * Residual.pairs


def test_stem_frozen():
    model = Residual()
    for p in [*model.stem.parameters(), *model.stem_bn.parameters()]:
        p.requires_grad_(False)
    assert_like_eval(model, torch.randn(2, 3, 8, 8), fused=Residual.pairs - 1)
    assert codes(model)[0] is Code.NO_GRAD


def test_norm_back_in_training_mode():
    model, x = Fn(lambda m, x: m.bn(m.conv(x))), torch.randn(2, 4, 6, 6)
    turn_on(model)
    model(x)
    expected = copy.deepcopy(turn_off(copy.deepcopy(model))).train()(x)
    model.train()
    mean = model.bn.running_mean.clone()
    assert torch.equal(model(x), expected)
    assert codes(model) == [Code.BATCH_STATISTICS]
    assert not torch.equal(model.bn.running_mean, mean)
    turn_on(model)
    model(x)
    assert codes(model) == [Code.FUSED]


def test_norm_without_running_statistics():
    model = turn_on(
        Fn(lambda m, x: m.bn(m.conv(x)), bn=nn.BatchNorm2d(4, track_running_stats=False))
    )
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(model(x), model.bn(model.conv(x)))
    assert codes(model) == [Code.BATCH_STATISTICS]


def test_double_backward_through_a_model():
    model, x, _ = make("resnet")
    model, x = model.double(), x.double().requires_grad_()

    def penalty():
        (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), list(model.parameters()))

    expected = penalty()
    turn_on(model)
    for a, b in zip(penalty(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_model_under_functorch():
    model, x, _ = make("resnet")
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(p, v):
        return torch.func.functional_call(model, p, (v[None],)).square().sum()

    def everything():
        grads = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        _, tangent = torch.func.jvp(lambda v: loss(parameters, v), (x[0],), (x[1],))
        return [*grads.values(), tangent]

    expected = everything()
    turn_on(model)
    model(x)
    for a, b in zip(everything(), expected, strict=True):
        assert torch.equal(a, b)
    assert torch.func.functional_call(model, parameters, (x,)).shape == model(x).shape


@pytest.mark.parametrize("transform", ["vmap", "jvp", "grad"])
def test_batch_norm_inside_a_transform(transform):
    """The layer runs outside it, so that the batch norm is found with its output."""

    def forward(m, x):
        c, one = m.conv(x), torch.ones(2)
        if transform == "vmap":
            return torch.vmap(lambda z: m.bn(c) * z)(one)
        if transform == "jvp":
            return torch.func.jvp(lambda z: m.bn(c) * z[0], (one,), (one,))[1]
        return torch.func.grad(lambda z: (m.bn(c) * z[0]).sum())(one)

    model, x = Fn(forward), torch.randn(2, 4, 6, 6)
    expected = model(x)
    assert torch.equal(turn_on(model)(x), expected)
