"""Trained scales other than batch norms' weights: what is recognized, and that it is right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from common import LAYERS, channels, example_input
from joint_graphs import run_pass
from oracle import PassRecorder
from programs import Norm, Residual, Scale, check_model
from torch import Tensor, nn

from convbn_inductor_pass import Code

FORMS = ("index", "left", "expanded", "divide", "addcmul", "last", "two", "number", "in place")


def codes_of(model: nn.Module, *inputs: Tensor, **options: bool | None) -> list[Code]:
    """Codes of the decisions about ``model``, whose results are checked on the way."""
    return [r.code for r in check_model(model, *inputs, **options)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, dtype):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    model = nn.Sequential(layer, Norm(channels(layer)), nn.ReLU()).to(dtype)
    x = example_input(layer, dtype=dtype, requires_grad=True)
    assert codes_of(model, x) == [Code.FUSED]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form, batch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), Scale(6, form), nn.ReLU())
    assert codes_of(model, torch.randn(batch, 4, 5, 5, requires_grad=True)) == [Code.FUSED]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 4), (2, 5, 4), (2, 3, 5, 4), (1, 1, 4)], ids=str)
def test_linear_layers(shape, bias):
    torch.manual_seed(0)

    class LayerScale(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.gamma = nn.Linear(4, 4, bias=bias), nn.Parameter(torch.randn(4))

        def forward(self, x):
            return x + self.linear(x) * self.gamma

    codes = codes_of(LayerScale(), torch.randn(shape, requires_grad=True))
    if shape[:-1] != (1, 1):  # products with one row are not matrix products to Inductor
        assert codes == [Code.FUSED]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_channels_first_and_last(dynamic, autocast):
    """torchvision's ConvNeXt block: the scale comes after a permutation."""
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=4)
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
            self.gamma = nn.Parameter(torch.randn(4, 1, 1))

        def forward(self, x):
            y = F.gelu(self.up(self.conv(x).permute(0, 2, 3, 1)))
            return x + self.gamma * self.down(y).permute(0, 3, 1, 2)

    x = torch.randn(2, 4, 5, 6, requires_grad=True)
    assert codes_of(Block(), x, dynamic=dynamic, autocast=autocast) == [Code.FUSED]


def test_zero_scale():
    torch.manual_seed(0)
    model = Residual(nn.Conv2d(4, 4, 3, padding=1), Scale(4))
    nn.init.zeros_(model.inner[1].gamma)
    assert codes_of(model, torch.randn(2, 4, 5, 5, requires_grad=True)) == [Code.FUSED]


def test_first_layer():
    """Whose input needs no gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), Norm(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3))
    assert codes_of(model, torch.randn(2, 4, 5, 5)) == [Code.FUSED]


def test_layer_used_twice():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(4, 4, 3, padding=1), Norm(4)
    model = nn.Sequential(conv, norm, nn.ReLU(), conv, norm)
    assert codes_of(model, torch.randn(2, 4, 5, 5, requires_grad=True)) == [Code.FUSED, Code.FUSED]


def test_layers_of_one_input():
    """As queries and keys: each weight gradient goes with its own layer."""
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)
            self.a, self.b = Scale(4), Scale(4)

        def forward(self, x):
            return self.a(self.q(x)).tanh() @ self.b(self.k(x)).sin().T

    codes = codes_of(Two(), torch.randn(3, 4, requires_grad=True))
    assert codes == [Code.SAVED_ANYWAY] * 2 or codes == [Code.FUSED, Code.SAVED_ANYWAY]


class Fn(nn.Module):
    """A convolution, and a function of its output, the input and vectors of parameters."""

    def __init__(self, fn, channels=4):
        super().__init__()
        self.conv, self.fn = nn.Conv2d(channels, channels, 1), fn
        self.v, self.w = (nn.Parameter(torch.rand(channels, 1, 1) + 0.5) for _ in range(2))

    def forward(self, x):
        return self.fn(self.conv(x), x, self.v, self.w)


ACTIVATIONS = {
    "relu": (F.relu, True),
    "relu6": (F.relu6, True),
    "leaky_relu": (lambda y: F.leaky_relu(y, 0.1), True),
    "max_pool": (lambda y: F.max_pool2d(y, 2), True),
    "sigmoid": (torch.sigmoid, True),  # computes its gradient from its result
    "gelu": (F.gelu, False),
    "silu": (F.silu, False),
    "square": (lambda y: y * y, False),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    """Nothing is gained where backward needs what the activation is of."""
    torch.manual_seed(0)
    activation, gains = ACTIVATIONS[name]
    model = Fn(lambda y, x, v, w: activation(y * v + w))
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    assert codes_of(model, x) == [Code.FUSED if gains else Code.SAVED_ANYWAY]


LEFT = {
    "output used elsewhere": (lambda y, x, v, w: y * v + y.mean(), Code.OTHER_GRADIENT),
    "two chains": (lambda y, x, v, w: (y * v).relu() + y * w, Code.OTHER_GRADIENT),
    "transposed": (lambda y, x, v, w: (y.mT * v) @ y, Code.OTHER_GRADIENT),
    "scale of itself": (lambda y, x, v, w: y * y.mean((2, 3), keepdim=True), None),
    "per pixel": (lambda y, x, v, w: y * v[:, 0, 0], None),
    "per sample": (lambda y, x, v, w: y * x.mean((1, 2, 3), keepdim=True), None),
    "squeeze and excite": (lambda y, x, v, w: y * (x.mean((2, 3), keepdim=True) * v), None),
    "shift alone": (lambda y, x, v, w: (y + v).relu(), None),
    "frozen": (lambda y, x, v, w: (y * v.detach()).relu(), None),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name):
    torch.manual_seed(0)
    fn, code = LEFT[name]
    x = torch.randn(2, 4, 4, 4, requires_grad=True)
    assert codes_of(Fn(fn), x) == ([] if code is None else [code])


class Transposed(torch.autograd.Function):
    """``y * v`` with a gradient for ``v`` that sums over products with the transposed gradient."""

    @staticmethod
    def forward(ctx, y, v):
        ctx.save_for_backward(y, v)
        return y * v

    @staticmethod
    def backward(ctx, g):
        y, v = ctx.saved_tensors
        return g * v, (g * y.mT).sum((0, 2, 3)).view_as(v)


def test_moves_must_agree():
    torch.manual_seed(0)
    model = Fn(lambda y, x, v, w: Transposed.apply(y, v))
    x = torch.randn(2, 4, 4, 4, requires_grad=True)
    assert codes_of(model, x) == [Code.OTHER_GRADIENT]


def test_batch_of_one_with_a_scale_from_activations():
    """There it is one number per channel, and the same is right."""
    torch.manual_seed(0)
    model = Fn(lambda y, x, v, w: y * (x.mean((2, 3), keepdim=True) * v))
    codes_of(model, torch.randn(1, 4, 4, 4, requires_grad=True))


def test_mixed_dtypes_are_left_alone():
    model = Fn(lambda y, x, v, w: y.double() * v.double())
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    assert codes_of(model, x) == [Code.UNSUPPORTED_DTYPE]


def test_symbolic_sizes_are_not_guarded_on():
    """Of as many rows as channels there is nothing special."""
    torch.manual_seed(0)
    linear, gamma = nn.Linear(4, 4), nn.Parameter(torch.randn(4))

    def fn(x):
        y = linear(x) * gamma
        return (y @ y.T.sin()).sum()

    recorder = PassRecorder()
    compiled = torch.compile(fn, backend=recorder, dynamic=True)
    for rows in (6, 4, 5):
        compiled(torch.randn(rows, 4)).backward()
    assert len(recorder.results) == recorder.fused == 1


def test_size_that_depends_on_data():
    """As where a mask chooses the tokens."""
    torch.manual_seed(0)

    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.gamma = nn.Linear(4, 4), nn.Parameter(torch.randn(4))
            self.conv, self.norm = nn.Conv1d(4, 4, 3, padding=1), Norm(4)

        def forward(self, x):
            y = x[x[:, 0] > 0]
            y = y + (self.linear(y[None]) * self.gamma)[0]
            return y + self.norm(self.conv(y.T[None]))[0].T

    x = torch.randn(9, 4, requires_grad=True)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        codes = codes_of(Chosen(), x)
    assert set(codes) == {Code.FUSED}  # one: torch 2.11 breaks the graph at the convolution


class OtherSums(nn.Module):
    """Backward sums the same gradient in other ways: kept dimensions, rows, images, everything.

    None of these is the sum per channel that a batch norm's scale needs.
    """

    def __init__(self, kind):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6).eval()
        self.bn.bias.requires_grad_(False)  # else its own sum is there
        shape = {"kept": (6, 1, 1), "rows": (6, 1, 5), "images": (3, 6, 1, 1), "all": (1, 1, 1)}
        self.shift = nn.Parameter(torch.randn(shape[kind]))

    def forward(self, x):
        return self.bn(self.conv(x)) + self.shift


@pytest.mark.parametrize("kind", ["kept", "rows", "images", "all"])
def test_other_sums_of_the_gradient_are_not_taken(kind):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    (result,) = run_pass(OtherSums(kind), x)
    assert result.codes == [Code.FUSED]
    sums = "torch.ops.aten.sum.dim_IntList("
    # One sum goes, that over the layer's output; the inner product and a sum of g come.
    assert result.after.count(sums) == result.before.count(sums) + 1
    assert codes_of(OtherSums(kind), x) == [Code.FUSED]


def test_a_sum_that_is_there_is_taken():
    torch.manual_seed(0)
    model, x = OtherSums("kept"), torch.randn(3, 4, 5, 5, requires_grad=True)
    model.bn.bias.requires_grad_(True)
    (result,) = run_pass(model, x)
    sums = "torch.ops.aten.sum.dim_IntList("
    assert result.after.count(sums) == result.before.count(sums)
