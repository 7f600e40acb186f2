"""Networks and workloads are what they say: sizes, pairs, protocols, merged modules."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from bench import cases, module_pairs, protocols
from bench.models import other_ranks, parameter_free, repvgg, transposed
from bench.workload import Settings, setup

TINY = Settings("timeseries_fcn", batch=2, shape=(12, 16))


@pytest.mark.parametrize(
    ("build", "millions"),
    [
        (parameter_free.resnet50, 25.6),
        (parameter_free.resnet50_max, 14.2),
        (parameter_free.resnet50_hybrid, 17.3),
        (repvgg.repvgg_a0, 9.1),
        (transposed.dcgan_generator, 3.6),
    ],
)
def test_networks_have_the_published_number_of_parameters(build, millions):
    with torch.device("meta"):
        count = sum(p.numel() for p in build().parameters())
    assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("network", "shape", "expected"),
    [
        (parameter_free.resnet50_hybrid, (2, 3, 64, 64), (2, 1000)),
        (parameter_free.vit_s_max, (2, 3, 224, 224), (2, 1000)),
        (parameter_free.pit_s_max, (2, 3, 224, 224), (2, 1000)),
        (repvgg.repvgg_b0, (2, 3, 64, 64), (2, 1000)),
        (transposed.UNet, (2, 3, 32, 32), (2, 21, 32, 32)),
        (transposed.dcgan_generator, (2, 100, 1, 1), (2, 3, 64, 64)),
        (other_ranks.TimeSeriesFCN, (2, 12, 16), (2, 10)),
        (other_ranks.ConvNet3d, (2, 3, 8, 32, 32), (2, 400)),
    ],
)
def test_output_shapes(network, shape, expected):
    with torch.device("meta"):
        assert network().eval()(torch.empty(shape)).shape == expected


class Net(nn.Module):
    """Pairs of all kinds, a layer with two batch norms, and a batch norm after no layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.up = nn.ConvTranspose2d(4, 8, 2, stride=2, groups=2)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8, affine=False)])
        self.shared = nn.Conv2d(8, 8, 1)
        self.first, self.second = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)
        self.last = nn.BatchNorm1d(5)

    def forward(self, x):
        x = self.norms[0](self.up(self.stem(x)))
        c = self.shared(x)
        x = self.first(c) + self.second(c)
        return self.last(self.head(x.mean((2, 3))))


def _network():
    torch.manual_seed(0)
    net = Net()
    for module in net.modules():
        if protocols.is_batch_norm(module):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.normal_(module.bias)
    return net.eval()


def test_pairs_are_found_by_running():
    assert module_pairs.find_pairs(_network(), (torch.randn(2, 3, 8, 8),)) == {
        "stem.1": "stem.0",
        "norms.0": "up",
        "last": "head",
    }


@pytest.mark.parametrize("transform", [module_pairs.merge, module_pairs.tune_eagerly])
def test_merged_and_tuned_networks_compute_the_same(transform):
    net, x = _network().double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    other = transform(net, (x,))
    torch.testing.assert_close(other(x), net(x))
    assert not any(a is b for a in other.parameters() for b in net.parameters())
    if transform is module_pairs.tune_eagerly:
        (net(x) ** 2).sum().backward()
        (other(x) ** 2).sum().backward()
        expected = sorted(p.grad.norm().item() for p in net.parameters())
        assert sorted(p.grad.norm().item() for p in other.parameters()) == pytest.approx(expected)


def _trainable(protocol):
    case = cases.Case("net", "test", _network, first_stages=("stem",), head="head.")
    net = case.build().requires_grad_(True)
    protocols.PROTOCOLS[protocol].freeze(net, case)
    return {name for name, p in net.named_parameters() if p.requires_grad}


def test_protocols_freeze_what_they_say():
    every = {name for name, _ in _network().named_parameters()}
    norms = {n for n in every if n.split(".")[0] in ("first", "second", "last")}
    norms |= {"stem.1.weight", "stem.1.bias"}
    stem = {n for n in every if n.startswith("stem.")}
    assert _trainable("all") == every
    assert _trainable("frozen-stages") == every - stem
    assert _trainable("frozen-bn") == every - norms
    assert _trainable("bn-tuning") == norms | {"head.weight", "head.bias"}
    assert _trainable("adversarial") == _trainable("inference") == set()


def test_frozen_stages_need_stages():
    with pytest.raises(protocols.NotApplicable, match="no first stages"):
        setup(dataclasses.replace(TINY, protocol="frozen-stages"))


def test_setup_repeats_and_settles_batch_norms():
    first, again = setup(TINY), setup(TINY)
    assert torch.equal(first.inputs[0], again.inputs[0])
    states = [workload.model.state_dict().values() for workload in (first, again)]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    norm = next(m for m in first.model.modules() if protocols.is_batch_norm(m))
    assert not norm.training
    assert norm.momentum == 0.1
    assert norm.running_mean.abs().max() > 0
    adversarial = setup(dataclasses.replace(TINY, protocol="adversarial"))
    assert adversarial.inputs[0].requires_grad


def test_settings_are_checked():
    with pytest.raises(ValueError, match="precision must be one of float32, bf16"):
        dataclasses.replace(TINY, precision="int8")
