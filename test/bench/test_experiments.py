"""What the experiments rest on, without running them."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sklearn")
from bench.experiments import adversarial, bn_tuning, detection, lab, stability


@pytest.fixture(name="net")
def _net():
    return lab.pretrain(0, epochs=1)


def test_digits_are_split_without_overlap():
    (x, y), (test_x, test_y) = lab.digits(5, 9)
    assert len(x) + len(test_x) == 896
    assert set(y.tolist()) == set(test_y.tolist()) == set(range(5))
    images = {i.numpy().tobytes() for i in x}
    assert len(images & {i.numpy().tobytes() for i in test_x}) <= 3  # digits that are the same


def test_rates_at_which_a_network_trains():
    rows = [
        {"network": "n", "mode": "tune", "lr": lr, "seed": seed, "trained": ok, "accuracy": ok / 2}
        for lr in stability.RATES
        for seed, ok in enumerate((True, lr < 0.1))
    ]
    found = stability.summarise(rows, "n", "tune")
    assert found["trains_at"] == [0.001, 0.003, 0.01, 0.03]
    assert found["seeds_that_train"] == [2, 2, 2, 2, 1, 1, 1]
    assert found["accuracy"] == [0.5] * 4 + [0.25] * 3


def test_scaling_is_inverse(net):
    found = stability.scales(net, lab.digits(5, 9)[0])
    for s, weight, gradient in zip(found["scale"], found["weight"], found["gradient"], strict=True):
        assert weight == pytest.approx(s, rel=1e-4)
        assert gradient == pytest.approx(1 / s, rel=1e-4)


def test_attack_stays_within_its_bound_and_raises_the_loss(net):
    x, y = (t[:32] for t in lab.digits(0, 4)[1])
    adversary = adversarial.attack(net, x, y)
    assert (adversary - x).abs().max() <= adversarial.EPSILON + 1e-6
    assert F.cross_entropy(net(adversary), y) > F.cross_entropy(net(x), y)


def test_protocols_train_what_they_say(net):
    trained = {}
    for protocol in bn_tuning.PROTOCOLS:
        bn_tuning.prepare(net, protocol)
        trained[protocol] = {n for n, p in net.named_parameters() if p.requires_grad}
    assert trained["linear probing"] == {"head.weight", "head.bias"}
    norms = sum(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())
    assert len(trained["BN-tuning"]) == 2 + 2 * norms
    assert trained["end-to-end"] == {n for n, _ in net.named_parameters()}


def test_scenes_have_their_digits():
    images, targets = detection.scenes(16, 0, True)
    assert images.shape == (16, 1, 32, 32)
    assert [(t >= 0).sum().item() for t in targets] == [1 + n % 4 for n in range(16)]
    right = F.one_hot(targets.clamp(min=0), 10).permute(0, 3, 1, 2) * 10.0
    logits = torch.cat([(targets >= 0).float()[:, None] * 2 - 1, right], 1)
    assert detection.f1(lambda x: logits, images, targets) == 1
    assert detection.f1(lambda x: -logits, images, targets) == 0
