"""cuDNN's convolution with an epilogue: which candidates it takes, and that it is right on a GPU.

On CPU the operator is computed by its parts: there it is tested which candidates are given to the
kernel, and with which arguments, not what cuDNN computes.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from common import Residual, spread_statistics
from passes.forward_folding.folding import (
    check_residual_written_before_relu,
    codes,
    compiled,
    folded,
)
from torch import Tensor, nn
from torch._inductor import config as inductor_config

from convbn_inductor_pass._torch import inductor
from convbn_inductor_pass.graph import operators

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The kernel may be taken on CPU, too."""
    monkeypatch.setattr(inductor, "has_cudnn_epilogues", lambda device: True)


def taken(records) -> list[str]:
    return [r.epilogue for r in records if r.code.rewritten and r.kernel == "cudnn"]


# The batch norms of a residual network keep groups of 1 where cuDNN is to take every layer.
EPILOGUES = ["relu", "relu", "add+relu", "relu", "relu"]


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_block_of_a_residual_network_but_the_grouped_layer(channels_last):
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(2, 3, 8, 8)
    if channels_last:
        model, x = (t.to(memory_format=torch.channels_last) for t in (model, x))
    out, records = folded(model, x)
    assert taken(records) == EPILOGUES
    torch.testing.assert_close(out, model(x).detach())


class Branches(nn.Module):
    """Two layers whose outputs are added, as where a residual network halves its maps."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.b, self.bn_b = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        spread_statistics(self)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return (self.bn_a(self.a(x)) + self.bn_b(self.b(x))).relu()


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(("kind", "count"), [(Residual, 5), (Branches, 1)])
def test_through_inductor(kind, count):
    torch.manual_seed(0)
    model, x = kind(), torch.randn(2, 3, 8, 8)
    out, records = compiled(model, x)
    assert len(taken(records)) == count
    expected = model(x).detach()
    torch.testing.assert_close(out, expected)
    assert out.stride() == expected.stride()


@pytest.mark.usefixtures("as_on_a_gpu")
def test_nothing_to_compute():
    """Inductor does not restore the strides of a result without elements."""
    _, records = folded(Branches(), torch.randn(0, 3, 6, 6))
    assert taken(records) == []


@pytest.mark.usefixtures("as_on_a_gpu")
def test_one_of_two_branches_adds_the_other():
    torch.manual_seed(0)
    model, x = Branches(), torch.randn(2, 3, 6, 6)
    out, records = folded(model, x)
    assert taken(records) == ["add+relu"]
    assert codes(records) == ["FOLDED"] * 2
    torch.testing.assert_close(out, model(x).detach())


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("groups", [(1, 1), (2, 1), (1, 2)])
def test_the_addition_is_a_step_of_the_other_branch(groups):
    """As for maps of one element and a batch of one: it goes into one layer only."""
    torch.manual_seed(0)
    x, s = torch.randn(1, 4, 3, 3), torch.randn(4, 1, 1)
    weights = (torch.randn(4, 4 // g, 3, 3) for g in groups)

    def fn(x: Tensor, s: Tensor, v: Tensor, w: Tensor) -> Tensor:
        first, second = (F.conv2d(x, u, groups=g) for u, g in zip((v, w), groups, strict=True))
        return F.relu(first * s + second * s)

    inputs = x, s, *weights
    out, records = folded(fn, *inputs)
    assert codes(records) == ["FOLDED"] * 2
    torch.testing.assert_close(out, fn(*inputs))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_convolution_without_a_batch_norm():
    torch.manual_seed(0)
    x, w, b = torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3), torch.randn(4)

    def fn(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.relu(x + F.relu(F.conv2d(x, w, b, padding=1) + x))

    out, records = folded(fn, x, w, b)
    assert taken(records) == ["add+relu"]
    torch.testing.assert_close(out, fn(x, w, b))


def declined(fn, *inputs: Tensor) -> None:
    out, records = folded(fn, *inputs)
    assert not taken(records)
    torch.testing.assert_close(out, fn(*inputs))


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    "after",
    [
        lambda y, x: y + x,  # cuDNN always rectifies
        lambda y, x: F.silu(y),
        lambda y, x: F.relu(y + x[:1]),
        lambda y, x: F.relu(y.add(x, alpha=2)),
        lambda y, x: F.relu(y * x),
        lambda y, x: F.relu(y - x),
        lambda y, x: F.relu(y) + y,
        lambda y, x: (F.relu(y + x), y),
        lambda y, x: F.relu(y.mT + x),  # rows and columns are exchanged
    ],
)
def test_declined_for_the_epilogue(after):
    torch.manual_seed(0)
    x, w, s = torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3), torch.randn(4, 1, 1)
    declined(lambda x, w, s: after(F.conv2d(x, w, padding=1) * s, x), x, w, s)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_declined_where_the_residual_is_written_to_before_relu():
    check_residual_written_before_relu()


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("kind", ["transposed", "grouped", "1d", "3d", "double", "dynamic", "cpp"])
def test_declined_for_the_layer(kind):
    torch.manual_seed(0)
    dims, groups = {"1d": 1, "3d": 3}.get(kind, 2), 2 if kind == "grouped" else 1
    conv = getattr(F, f"conv{'_transpose' * (kind == 'transposed')}{dims}d")
    dtype = torch.float64 if kind == "double" else torch.float32
    x = torch.randn(2, 4, *[5] * dims, dtype=dtype)
    w = torch.randn(4, 4 // groups, *[3] * dims, dtype=dtype)
    if kind == "dynamic":
        torch._dynamo.mark_dynamic(x, 0)
    with inductor_config.patch(cpp_wrapper=kind == "cpp"):
        declined(lambda x, w: F.relu(conv(x, w, groups=groups) * 2), x, w)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_declined_where_nothing_is_made_channels_last():
    x, w = torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3)
    with inductor_config.patch(layout_optimization=False):
        declined(lambda x, w: F.relu(F.conv2d(x, w) * 2), x, w)


def test_where_it_may_be_called(monkeypatch):
    """On a GPU of NVIDIA's with cuDNN, unless the user wants what is deterministic."""
    cudnn, gpu = torch.backends.cudnn, torch.device("cuda")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(cudnn, "is_available", lambda: True)
    assert inductor.has_cudnn_epilogues(gpu)
    assert not inductor.has_cudnn_epilogues(torch.device("cpu"))
    with cudnn.flags(deterministic=True):
        assert not inductor.has_cudnn_epilogues(gpu)
    with cudnn.flags(enabled=False):
        assert not inductor.has_cudnn_epilogues(gpu)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert not inductor.has_cudnn_epilogues(gpu)


SHAPES = [
    # input, weight, stride, padding, dilation, groups
    ((2, 4, 6, 5), (6, 4, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((2, 4, 6, 5), (6, 2, 3, 1), (2, 1), (0, 1), (1, 2), 2),
    ((1, 1, 7, 7), (8, 1, 3, 3), (1, 1), (0, 0), (1, 1), 1),  # one channel
    ((3, 8, 1, 1), (4, 8, 1, 1), (1, 1), (0, 0), (1, 1), 1),  # maps of one element
    ((0, 4, 6, 5), (6, 4, 1, 1), (1, 1), (0, 0), (1, 1), 1),  # no examples
]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("options", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_operator(shapes, options, dtype, device):
    """On CPU its schema and meta function; on a GPU what cuDNN computes, or the parts instead."""
    torch.manual_seed(0)
    x_shape, w_shape, *geometry, groups = shapes
    has_bias, has_other = options

    def random(*shape: int) -> Tensor:
        out = torch.randn(shape, dtype=dtype, device=device)
        return out.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else out

    x, w = random(*x_shape), random(*w_shape)
    bias = random(w_shape[0]) if has_bias else None
    expected = F.conv2d(x, w, bias, *geometry, groups)
    other = random(*expected.shape) if has_other else None
    arguments = (x, w, bias, other, *geometry, groups)
    if device == "cpu":
        torch.library.opcheck(operators.convolution_relu, arguments)
        return
    out = operators.convolution_relu(*arguments)
    expected = F.relu(expected if other is None else expected + other)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)  # TF32 and bfloat16
    assert out.is_contiguous(memory_format=torch.channels_last)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_on_a_gpu(dtype, channels_last):
    torch.manual_seed(0)
    model, x = Residual(64).to("cuda", dtype), torch.randn(8, 3, 32, 32, device="cuda", dtype=dtype)
    if channels_last:
        model, x = (t.to(memory_format=torch.channels_last) for t in (model, x))
    out, records = compiled(model, x)
    assert taken(records)
    with torch.no_grad():
        expected = model(x)
        assert out.stride() == expected.stride()
        exact = model.double()(x.double())
    error, by_eval = ((o.double() - exact).abs().max() for o in (out, expected))
    assert error <= 2 * by_eval + 4 * torch.finfo(dtype).eps * exact.abs().max()
