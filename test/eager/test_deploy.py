"""Deploy mode: what is merged, what is left, and that it is undone."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from eager_helpers import Fn, saved_bytes
from eager_models import PaperM, make
from torch import nn

from convbn_inductor_pass import turn_off, turn_on


def deployed(model, x):
    with pytest.warns(UserWarning, match="unstable"):
        return turn_on(model, "deploy", example_inputs=(x,))


def test_deploy():
    model, x, _ = make("unet")
    expected = model(x)
    before = dict(model.named_parameters())
    with pytest.warns(UserWarning, match="mode='tune' to train"):
        turn_on(model, "deploy")
    first = model(x)  # finds the pairs
    torch.testing.assert_close(first, expected)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    merged = dict(model.named_parameters())
    assert merged.keys() == {n for n in before if ".1." not in n and "up_bn" not in n} | {
        n.replace("weight", "bias") for n in before if ".0." in n
    }
    torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()
    assert all(p.grad is not None for p in merged.values())
    other = pickle.loads(pickle.dumps(model))
    for m in (model, other):
        turn_off(m)
        assert torch.equal(m(x), expected)
    assert all(p is before[n] for n, p in model.named_parameters())


def test_deploy_leaves_what_it_cannot_merge():
    model, x, _ = make("retina")  # one convolution, several batch norms
    expected = model(x)
    with pytest.warns(UserWarning, match="unstable"):
        turn_on(model, "deploy", example_inputs=(x,))
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 6
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("other", ["norm", "layer"])
def test_deploy_leaves_modules_whose_tensors_are_used(other):
    """A functional call would not see that its module was replaced."""

    def forward(m, x):
        if other == "norm":
            bn = m.bn
            return F.batch_norm(m.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias)
        return m.bn(F.conv2d(x, m.conv.weight, m.conv.bias))

    model, x = Fn(forward), torch.randn(2, 4, 6, 6)
    expected = model(x)
    assert torch.equal(deployed(model, x)(x), expected)


def test_deploy_merges_a_pair_that_is_used_often():
    """A head with its batch norms on several levels, and one use too many."""

    def forward(m, x):
        return m.bn(m.conv(x)) + m.bn(m.conv(x[:, :, ::2, ::2])).mean((2, 3), keepdim=True)

    x = torch.randn(2, 4, 6, 6)
    model, other = Fn(forward), Fn(lambda m, x: forward(m, x) + m.conv(x))
    for m in (model, other):
        expected = m(x)
        torch.testing.assert_close(deployed(m, x)(x), expected)
    tune = turn_on(turn_off(copy.deepcopy(model)))
    assert saved_bytes(tune, x) == saved_bytes(model, x)
    assert not isinstance(model.bn, nn.BatchNorm2d)
    assert isinstance(other.bn, nn.BatchNorm2d)


def test_deploy_leaves_no_trace_of_its_example():
    model = PaperM().train()
    x = torch.randn(2, 3, 12, 12)
    statistics = model.bn1.running_mean.clone()
    norm = model.bn1
    with pytest.warns(UserWarning, match="unstable"):
        turn_on(model, "deploy", example_inputs=(x,))
    assert torch.equal(norm.running_mean, statistics)
    assert model.training
    assert not isinstance(model.bn1, nn.BatchNorm2d)
