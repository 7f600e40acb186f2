"""Deploy mode: what is merged, what is left, and that it is undone."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from common import spread_statistics
from eager_helpers import Fn, codes, saved_bytes
from eager_models import PaperM, make
from torch import nn
from torch.nn.utils import parametrizations

from convbn_inductor_pass import Code, decisions, turn_off, turn_on


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


def test_deploy_leaves_a_layer_whose_output_is_returned():
    def forward(m, x):
        c = m.conv(x)
        return c, m.bn(c)

    model, x = Fn(forward), torch.randn(2, 4, 6, 6)
    expected = model(x)
    assert all(map(torch.equal, deployed(model, x)(x), expected))
    assert codes(model) == [Code.LAYER_OUTPUT_USED]


@pytest.mark.parametrize("view", [(3, 4, 4), (1, 12, 4), (-1, 2, 2), (-1, 2), "unbatched"])
def test_deploy_leaves_norms_of_another_dimension(view):
    """Which may have as many elements as there are channels."""
    if view == "unbatched":
        layer, norm = nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4)
        model, x = Fn(lambda m, x: m.bn(m.conv(x)), layer, norm), torch.randn(4, 4)
    else:
        layer, norm = nn.Linear(4, 4), nn.BatchNorm1d(view[1])
        model, x = Fn(lambda m, x: m.bn(m.conv(x).view(view)), layer, norm), torch.randn(3, 4, 4)
    expected = model(x)
    assert torch.equal(deployed(model, x)(x), expected)
    assert codes(model) == [Code.UNBATCHED]


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


def weight_norm(model):
    parametrizations.weight_norm(model.conv)


def hook_on_the_layer(model):
    model.conv.register_forward_hook(lambda m, args, out: None)


def hook_that_stores(model):
    model.conv.register_forward_hook(lambda m, args, out: setattr(m, "last", out))


def tied_weight(model):
    model.other = nn.Conv2d(4, 4, 3)
    model.other.weight = model.conv.weight


def subclass(model):
    class Other(nn.BatchNorm2d):
        pass

    model.bn = Other(4).eval()


def functional_norm(model):
    bn = model.bn
    model.function = lambda m, x: F.batch_norm(m.conv(x), bn.running_mean, bn.running_var)


def called_alone_too(model):
    model.function = lambda m, x: m.bn(m.conv(x)) + m.conv(x)


def weight_penalty(model):
    model.function = lambda m, x: m.bn(m.conv(x)) + m.conv.weight.norm()


def shared_bias(model):
    model.register_buffer("other", torch.randn_like(model.conv.weight))
    model.function = lambda m, x: m.bn(m.conv(x)) + F.conv2d(x, m.other, m.conv.bias, padding=1)


def returned_weight(model):
    model.function = lambda m, x: (m.bn(m.conv(x)), m.conv.weight)


def statistics_read(model):
    model.function = lambda m, x: m.bn(m.conv(x)) * m.bn.running_var.mean()


def output_used(model):
    def forward(m, x):
        c = m.conv(x)
        return m.bn(c) + c

    model.function = forward


USED = (Code.NOT_MERGED, "a parameter or buffer of the layer or the batch norm is used elsewhere")
LEFT = {
    weight_norm: (Code.NOT_MERGED, "by a parametrization"),
    hook_on_the_layer: (Code.NOT_MERGED, "has hooks"),
    hook_that_stores: (Code.LAYER_OUTPUT_USED, ""),
    tied_weight: (Code.NOT_MERGED, "tied"),
    subclass: (Code.NOT_MERGED, "not one of PyTorch's own modules"),
    functional_norm: (Code.NOT_MERGED, "or as functions"),
    called_alone_too: (Code.NOT_MERGED, "without each other"),
    weight_penalty: USED,
    shared_bias: USED,
    returned_weight: USED,
    statistics_read: USED,
    output_used: (Code.LAYER_OUTPUT_USED, ""),
}


@pytest.mark.parametrize("change", LEFT)
def test_deploy_says_what_it_left_and_why(change):
    model, x = Fn(lambda m, x: m.bn(m.conv(x))), torch.randn(2, 4, 6, 6)
    change(model)
    expected = model(x)
    deployed(model, x)
    code, detail = LEFT[change]
    (decision,) = decisions(model)
    assert decision.code is code
    assert not decision.code.rewritten
    assert decision.bytes_saved == 0
    assert detail in decision.detail
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_deploy_says_what_it_merged():
    model, x, pairs = make("unet")
    deployed(model, x)
    assert codes(model) == [Code.MERGED] * pairs
    for d in decisions(model):
        assert d.layer
        assert d.batch_norm
        assert d.bytes_saved == d.output_bytes > 0


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("undo", ["inner_first", "outer_first"])
def test_deploy_inside_tune(undo, example):
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model = nn.Sequential(inner, nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))
    model, x = spread_statistics(model).eval(), torch.randn(2, 3, 8, 8)
    expected = model(x)
    turn_on(model)
    model(x)
    assert codes(model) == [Code.FUSED] * 2
    if example:
        deployed(model[0], x)
    else:
        with pytest.warns(UserWarning, match="unstable"):
            turn_on(model[0], "deploy")
        model(x)  # finds the pair
    assert not isinstance(model[0][1], nn.BatchNorm2d)
    torch.testing.assert_close(model(x), expected)
    assert codes(model[0]) == [Code.MERGED]
    assert sorted(c.name for c in codes(model)) == ["FUSED", "MERGED"]
    for m in (model[0], model) if undo == "inner_first" else (model, model[0]):
        turn_off(m)
    assert torch.equal(model(x), expected)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_tune_inside_deploy():
    """The part that was turned on first is merged with the rest, and comes back."""
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model = nn.Sequential(inner, nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))
    model, x = spread_statistics(model).eval(), torch.randn(2, 3, 8, 8)
    expected = model(x)
    turn_on(model[0])
    deployed(model, x)
    assert codes(model).count(Code.MERGED) == 2
    torch.testing.assert_close(model(x), expected)
    turn_off(model)
    model(x)
    assert codes(model[0]) == [Code.FUSED]
