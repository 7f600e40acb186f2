"""cuDNN's convolution with an epilogue: where it is taken, and that it is right.

Without a GPU the operator is computed by its parts, on CPU; what cuDNN itself does is tested where
there is one.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from common import Residual, fastest, spread_statistics
from test_forward import bump, folded
from torch import Tensor, nn
from torch._inductor import config as inductor_config

import convbn_inductor_pass as cbn
from convbn_inductor_pass import ForwardCode, _inductor, kernels, ops, testing, timing

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The kernel may be taken on CPU, too, and is the fastest."""
    monkeypatch.setattr(_inductor, "has_cudnn_epilogues", lambda device: True)
    monkeypatch.setattr(kernels, "can_merge", lambda *_: False)  # what oneDNN would compute
    monkeypatch.setattr(timing, "seconds", fastest(kernels.CUDNN))


def taken(records) -> list[str]:
    return [r.epilogue for r in records if r.code.folded and r.kernel == kernels.CUDNN]


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_block_of_a_residual_network(channels_last):
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(2, 3, 8, 8)
    if channels_last:
        model, x = (t.to(memory_format=torch.channels_last) for t in (model, x))
    out, records = folded(model, x, forward="auto")
    assert taken(records) == ["relu", "relu", "add+relu", "relu", "add+relu", "relu"]
    torch.testing.assert_close(out, model(x).detach())


class Branches(nn.Module):
    """Two layers whose outputs are added, as where a residual network halves its maps."""

    def __init__(self, relu: bool = True) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.b, self.bn_b = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.relu = relu
        spread_statistics(self)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn_a(self.a(x)) + self.bn_b(self.b(x))
        return out.relu() if self.relu else out


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(("kind", "count"), [(Residual, 6), (Branches, 1)])
@pytest.mark.parametrize("grad", [False, True])
def test_through_inductor(kind, count, grad):
    torch.manual_seed(0)
    model, x = kind(), torch.randn(2, 3, 8, 8)
    with testing.fresh_compile(), cbn.options(forward="auto"), torch.set_grad_enabled(grad):
        cbn.clear_records()
        out = torch.compile(model)(x)
    assert len(taken(cbn.forward_records())) == count
    expected = model(x)
    torch.testing.assert_close(out, expected)
    assert out.stride() == expected.stride()
    if grad:
        parameters = tuple(model.parameters())
        gradients = (torch.autograd.grad(o.square().sum(), parameters) for o in (out, expected))
        for got, wanted in zip(*gradients, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_nothing_to_compute():
    """Inductor does not restore the strides of a result without numbers."""
    model, x = Branches(), torch.randn(0, 3, 6, 6)
    _, records = folded(model, x, forward="auto")
    assert taken(records) == []


@pytest.mark.usefixtures("as_on_a_gpu")
def test_one_of_two_branches_adds_the_other():
    torch.manual_seed(0)
    model, x = Branches(), torch.randn(2, 3, 6, 6)
    out, records = folded(model, x, forward="auto")
    assert taken(records) == ["add+relu"]
    assert [r.code for r in records] == [ForwardCode.FOLDED] * 2
    torch.testing.assert_close(out, model(x).detach())


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_convolution_without_a_batch_norm():
    torch.manual_seed(0)
    x, w, b = torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3), torch.randn(4)

    def fn(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.relu(x + F.relu(F.conv2d(x, w, b, padding=1) + x))

    out, records = folded(fn, x, w, b, forward="auto")
    assert taken(records) == ["add+relu"]
    torch.testing.assert_close(out, fn(x, w, b))


def declined(fn, *inputs: Tensor) -> None:
    out, records = folded(fn, *inputs, forward="auto")
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
        lambda y, x: F.relu(y + x)[:, :1],  # the slice's strides would change
    ],
)
def test_declined_for_what_follows(after):
    torch.manual_seed(0)
    x, w, s = torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3), torch.randn(4, 1, 1)
    declined(lambda x, w, s: after(F.conv2d(x, w, padding=1) * s, x), x, w, s)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_declined_where_the_residual_is_added_to_moved_numbers():
    """The shapes are equal, and the rows and columns exchanged."""
    torch.manual_seed(0)
    x, w, s = torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3), torch.randn(4, 1, 1)
    declined(lambda x, w, s: F.relu(F.conv2d(x, w, padding=1).mT * s + x), x, w, s)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_declined_where_the_residual_is_written_to_before_relu():
    """The kernel, in ReLU's place, would add what was written."""
    torch.manual_seed(0)
    x, w, s = torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3), torch.randn(4, 1, 1)
    other = torch.randn(2, 4, 6, 6)

    def fn(x: Tensor, w: Tensor, s: Tensor, other: Tensor) -> Tensor:
        y = F.conv2d(x, w, padding=1) * s + other
        bump(other)
        return F.relu(y)

    expected = fn(x, w, s, other.clone())
    out, (record,) = folded(fn, x, w, s, other.clone(), forward="auto")
    assert record.code is ForwardCode.WRITE_BETWEEN
    torch.testing.assert_close(out, expected)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("kind", ["transposed", "1d", "3d", "double", "dynamic", "cpp"])
def test_declined_for_the_layer(kind, monkeypatch):
    torch.manual_seed(0)
    dims = {"1d": 1, "3d": 3}.get(kind, 2)
    conv = getattr(F, f"conv{'_transpose' * (kind == 'transposed')}{dims}d")
    dtype = torch.float64 if kind == "double" else torch.float32
    x, w = torch.randn(2, 4, *[5] * dims, dtype=dtype), torch.randn(4, 4, *[3] * dims, dtype=dtype)
    if kind == "dynamic":
        torch._dynamo.mark_dynamic(x, 0)
    with inductor_config.patch(cpp_wrapper=kind == "cpp"):
        declined(lambda x, w: F.relu(conv(x, w) * 2), x, w)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_declined_where_nothing_is_made_channels_last():
    x, w = torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3)
    with inductor_config.patch(layout_optimization=False):
        declined(lambda x, w: F.relu(F.conv2d(x, w) * 2), x, w)


def test_only_chosen_by_measurement(monkeypatch):
    monkeypatch.setattr(_inductor, "has_cudnn_epilogues", lambda device: True)
    model, x = Residual(), torch.randn(2, 3, 8, 8)
    for forward in ("fold", "auto"):  # which counts bytes here
        out, records = folded(model, x, forward=forward)
        assert records
        assert not taken(records)
        torch.testing.assert_close(out, model(x).detach())


def test_where_it_may_be_called(monkeypatch):
    """On a GPU of NVIDIA's with cuDNN, unless the user wants what is deterministic."""
    cudnn, gpu = torch.backends.cudnn, torch.device("cuda")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(cudnn, "is_available", lambda: True)
    assert _inductor.has_cudnn_epilogues(gpu)
    assert not _inductor.has_cudnn_epilogues(torch.device("cpu"))
    with cudnn.flags(deterministic=True):
        assert not _inductor.has_cudnn_epilogues(gpu)
    with cudnn.flags(enabled=False):
        assert not _inductor.has_cudnn_epilogues(gpu)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert not _inductor.has_cudnn_epilogues(gpu)


SHAPES = [
    # input, weight, stride, padding, dilation, groups
    ((2, 4, 6, 5), (6, 4, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((2, 4, 6, 5), (6, 2, 3, 1), (2, 1), (0, 1), (1, 2), 2),
    ((1, 1, 7, 7), (8, 1, 3, 3), (1, 1), (0, 0), (1, 1), 1),  # one channel
    ((3, 8, 1, 1), (4, 8, 1, 1), (1, 1), (0, 0), (1, 1), 1),  # maps of one number
    ((0, 4, 6, 5), (6, 4, 1, 1), (1, 1), (0, 0), (1, 1), 1),  # no examples
]


def _refuses(arguments) -> bool:
    try:
        ops.convolution_relu(*arguments)
    except RuntimeError:
        return True
    return False


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("options", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_operator(shapes, options, dtype, device):
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
    expected = F.relu(expected if other is None else expected + other)
    arguments = (x, w, bias, other, *geometry, groups)
    if device == "cpu":
        torch.library.opcheck(ops.convolution_relu, arguments)
    if device == "cuda" and groups > 1 and _refuses(arguments):
        pytest.skip("cuDNN has no such kernel, which a trial tells")
    out = ops.convolution_relu(*arguments)
    tolerance = {} if device == "cpu" else {"rtol": 2e-2, "atol": 2e-2}  # TF32 and bfloat16
    torch.testing.assert_close(out, expected, **tolerance)
    assert out.is_contiguous(memory_format=torch.channels_last)


class _Aten:
    """PyTorch's operators, but for cuDNN's two, which this computes on CPU."""

    def __getattr__(self, name: str):
        operator = getattr(torch.ops.aten, name)
        if not name.startswith("cudnn"):
            return operator

        def compute(*arguments):
            names = [a.name for a in operator.default._schema.arguments]
            given = dict(zip(names, arguments, strict=True))
            geometry = [given[n] for n in ("stride", "padding", "dilation", "groups")]
            out = F.conv2d(given["self"], given["weight"], given["bias"], *geometry)
            return F.relu(out + given["alpha"] * given["z"] if "z" in given else out).contiguous()

        return compute


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("has_other", [False, True])
def test_how_cudnn_is_called(shapes, has_other, monkeypatch):
    """As the schemas of PyTorch's operators want it; the result is made channels-last."""
    monkeypatch.setattr(ops, "aten", _Aten())
    torch.manual_seed(0)
    x_shape, w_shape, *geometry, groups = shapes
    x, w, bias = torch.randn(x_shape), torch.randn(w_shape), torch.randn(w_shape[0])
    expected = F.conv2d(x, w, bias, *geometry, groups)
    other = torch.randn_like(expected) if has_other else None
    out = ops._convolution_relu(x, w, bias, other, *geometry, groups)
    torch.testing.assert_close(out, F.relu(expected if other is None else expected + other))
    assert out.is_contiguous(memory_format=torch.channels_last)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_on_a_gpu(dtype, channels_last, monkeypatch):
    monkeypatch.setattr(timing, "seconds", fastest(kernels.CUDNN))
    torch.manual_seed(0)
    model, x = Residual(64).to("cuda", dtype), torch.randn(8, 3, 32, 32, device="cuda", dtype=dtype)
    if channels_last:
        model, x = (t.to(memory_format=torch.channels_last) for t in (model, x))
    with testing.fresh_compile(), cbn.options(forward="auto"), torch.no_grad():
        cbn.clear_records()
        out = torch.compile(model)(x)
        assert taken(cbn.forward_records())
        expected = model(x)
        assert out.stride() == expected.stride()
        exact = model.double()(x.double())
    error, by_eval = ((o.double() - exact).abs().max() for o in (out, expected))
    assert error <= 2 * by_eval + 4 * torch.finfo(dtype).eps * exact.abs().max()


@needs_gpu
@pytest.mark.timed
def test_timed_on_a_gpu():
    model = Residual(64).to("cuda")
    x = torch.randn(8, 3, 32, 32, device="cuda")
    with testing.fresh_compile(), cbn.options(forward="auto"), torch.no_grad():
        cbn.clear_records()
        out = torch.compile(model)(x)
    records = cbn.forward_records()
    assert records
    assert all(r.seconds_exact > 0 for r in records)
    torch.testing.assert_close(out, model(x), rtol=2e-2, atol=2e-2)
