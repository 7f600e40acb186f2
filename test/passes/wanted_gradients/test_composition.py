"""Wanted gradients together with tune mode and with what else decides about what is saved."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from common import Residual, UNet
from joint_graphs import run_pass
from passes.wanted_gradients.wanted import codes, compare
from torch import nn
from torch._functorch import config as functorch_config
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint

from convbn_inductor_pass import Code, explain, options, testing
from convbn_inductor_pass.saved_tensors import saved_for_backward


class Network(nn.Module):
    """Two blocks of what the rules are about: strided, grouped and depthwise layers, two pools."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.block = nn.Sequential(
            *(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6(inplace=True)),
            *(nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.BatchNorm2d(32), nn.Hardtanh()),
            *(nn.Conv2d(32, 16, 3, padding=1, groups=2), nn.BatchNorm2d(16)),
        )
        self.head = nn.Linear(16, 5)
        self.checkpointed = False
        self.eval()

    def forward(self, x):
        x = F.max_pool2d(self.stem(x), 3, 2, 1)
        if self.checkpointed:
            y = checkpoint(self.block, x, use_reentrant=False)
        else:
            y = self.block(x)
        return self.head(F.avg_pool2d(F.relu(x + y), 4).mean((2, 3)))


def frozen(protocol):
    torch.manual_seed(0)
    model = Network()
    if protocol == "adversarial":
        model.requires_grad_(False)
    if protocol == "bn-tuning":
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.requires_grad_(False)
    return model


PROTOCOLS = ["all", "bn-tuning", "adversarial"]


@pytest.fixture(name="x")
def _x():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 32, 32, generator=generator, requires_grad=True)


def assert_close(model, x, **kwargs):
    compared = compare(model, x, **kwargs)
    for name, value in compared.plain_gradients.items():
        tolerance = 2e-2 if kwargs.get("autocast") else 1e-5
        scale = float(value.abs().max())
        torch.testing.assert_close(
            compared.gradients[name], value, rtol=0, atol=tolerance * scale, msg=name
        )
    return compared


@pytest.mark.parametrize(
    ("protocol", "dynamic", "autocast"),
    [
        *((protocol, False, False) for protocol in PROTOCOLS),
        ("all", True, False),
        ("bn-tuning", False, True),
        ("adversarial", False, True),
    ],
)
def test_with_tune_mode(protocol, dynamic, autocast, x):
    compared = assert_close(frozen(protocol), x, dynamic=dynamic, autocast=autocast)
    # In BN-tuning the mask is recomputed from the convolution's output.
    pooling = Code.SAVED_ANYWAY if protocol == "bn-tuning" else Code.MASK_AFTER_POOLING
    assert ("pooling", pooling) in compared.codes
    # Average pooling's input, before torch 2.13 max-pooling's, and frozen convolutions'.
    shapes = compared.codes.count(("shape", Code.SHAPE_ONLY))
    pools = 2 if TorchVersion(torch.__version__) < "2.13" else 1
    assert shapes == pools if protocol == "all" else shapes > 3


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_checkpointed(protocol, x):
    """What is recomputed is not saved, with the rules or without."""
    model = frozen(protocol)
    model.checkpointed = True
    assert_close(model, x)
    saved = explain(model, x).saved_bytes
    assert saved["tune"] <= saved["eval"]


@pytest.mark.parametrize(("protocol", "budget"), [*zip(PROTOCOLS, (0.1, 0.5, 0.5), strict=True)])
def test_activation_budget(protocol, budget, x):
    model = frozen(protocol)
    without = explain(model, x).saved_bytes["tune"]
    with functorch_config.patch(activation_memory_budget=budget):
        assert_close(model, x)
        assert explain(model, x).saved_bytes["tune"] <= without


def test_deterministic(x):
    torch.use_deterministic_algorithms(True)
    try:
        runs = [assert_close(frozen("all"), x).gradients for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(*runs, rtol=0, atol=0)


def test_compiled_autograd(x):
    model = frozen("adversarial")
    (plain,) = torch.autograd.grad(model(x).sum(), x)
    compiled = torch.compile(model, backend=testing.fast_backend())
    with torch._dynamo.compiled_autograd._enable(
        torch.compile(backend="eager", fullgraph=False), dynamic=False
    ):
        (gradient,) = torch.autograd.grad(compiled(x).sum(), x)
    torch.testing.assert_close(gradient, plain)


def test_gradients_of_several_losses(x):
    """The graph is kept: what is saved is read twice."""
    model = frozen("adversarial")
    compiled = torch.compile(model, backend=testing.fast_backend())
    for fn in (model, compiled):
        x.grad = None
        loss = fn(x).sum()
        loss.backward(retain_graph=True)
        once = x.grad.clone()
        loss.backward()
        torch.testing.assert_close(x.grad, 2 * once)


@pytest.mark.parametrize("model", [Residual, UNet])
@pytest.mark.parametrize("frozen_kinds", [(), (nn.BatchNorm2d,), (nn.Conv2d,), (nn.Module,)])
def test_never_more_than_without(model, frozen_kinds):
    model = model()
    for module in model.modules():
        if isinstance(module, frozen_kinds):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    after = saved_for_backward(model, x, mode="tune").new_bytes
    with options(deny=("*",)):
        before = saved_for_backward(model, x, mode="tune").new_bytes
    assert after <= before


def test_bn_tuning_saves_one_tensor_per_block():
    """The convolution's output; neither the next one's input nor a mask, and no weight gradient."""
    layers = []
    for _ in range(3):
        layers += [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*layers).eval()
    for module in model:
        if isinstance(module, nn.Conv2d):
            module.requires_grad_(False)
    x = torch.randn(4, 8, 32, 32)
    explanation = explain(model, x)
    saved = explanation.saved["tune"]
    large = [t for t in saved.tensors if t.nbytes > 1000]
    assert [t.nbytes for t in large if t.kind == "activation"] == [x.nbytes] * 3
    assert saved.bytes_of("mask") <= x.numel() // 8  # of the last block, where nothing else is read
    assert explanation.saved_bytes["eval"] >= 5 * x.nbytes
    (result,) = run_pass(model, x)
    assert "[True, True" not in result.after
    assert "[False, True" not in result.after


@contextlib.contextmanager
def real_bytes():
    """Counts the storages that autograd is given to save, besides parameters and inputs."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield storages


@pytest.mark.parametrize("protocol", ["all", "adversarial"])
def test_real_bytes(protocol, x):
    """Under Inductor, channels-last, autograd is given what ``explain`` says, to 1%."""
    model = frozen(protocol).to(memory_format=torch.channels_last)
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    with testing.fresh_compile(), real_bytes() as storages:
        loss = torch.compile(model)(x).sum()
    known = [*model.parameters(), *model.buffers(), x]
    for tensor in known:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    loss.backward()
    expected = explain(model, x).saved_bytes["tune"]
    assert sum(storages.values()) == pytest.approx(expected, rel=0.01)


def test_codes_of_all_rules(x):
    kinds = {kind for kind, code in codes(frozen("adversarial"), x) if code.rewritten}
    assert kinds == {"pooling", "shape", "mask"}
    assert ("activation", Code.MASK_FROM_OUTPUT) in codes(frozen("all"), x)
