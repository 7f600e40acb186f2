"""What is frozen saves no activation for its shape; a ReLU saves a mask where that is less."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import LAYERS, example_input, spread_statistics
from eager_helpers import Fn, codes, run, saved_bytes
from torch import nn
from torch.utils.checkpoint import checkpoint

from convbn_inductor_pass import Code, decisions, options, turn_on
from convbn_inductor_pass.functional.saved import saves_mask, saves_shape_only

N, C, SIZE = 2, 4, 8
ELEMENTS = N * C * SIZE * SIZE
ACTIVATION, MASK = 4 * ELEMENTS, ELEMENTS


class Net(nn.Module):
    """Two residual blocks without pooling, so that every activation has ``ELEMENTS`` elements."""

    def __init__(self, inplace=False):
        super().__init__()
        for i in range(2):
            setattr(self, f"conv{i}", nn.Conv2d(C, C, 3, padding=1, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(C))
        self.inplace = inplace

    def forward(self, x):
        for i in range(2):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x))
            x = F.relu(y + x, inplace=self.inplace)
        return x * 1


WANTED = {"all": "", "input": "-", "conv": "conv", "norm": "bn"}


def network(wanted, **how):
    torch.manual_seed(0)
    model = spread_statistics(Net(**how)).eval()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(WANTED[wanted]))
    x = torch.randn(N, C, SIZE, SIZE)
    return model, x.requires_grad_(wanted == "input")


# Of two blocks: ReLU's results or masks, layers' outputs, both layers' inputs. The network's input
# is not counted.
SAVED = {
    "all": (2 * ACTIVATION, 4 * ACTIVATION),
    "input": (2 * MASK, 4 * ACTIVATION),
    "conv": (2 * ACTIVATION, 4 * ACTIVATION),
    "norm": (2 * ACTIVATION + 2 * MASK, 4 * ACTIVATION),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("wanted", WANTED)
def test_saves_what_the_wanted_gradients_need(wanted, inplace):
    model, x = network(wanted, inplace=inplace)
    expected, gradients = run(model, x, parameters=dict(model.named_parameters()))
    exact = run(copy.deepcopy(model).double(), x.detach().double().requires_grad_(x.requires_grad))
    tuned, as_written = SAVED[wanted]
    assert saved_bytes(model, x) == as_written
    turn_on(model)
    for _ in range(3):
        assert saved_bytes(model, x) == tuned
        got, found = run(model, x)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert found.keys() == gradients.keys() == exact[1].keys()
        for n, g in exact[1].items():
            bound = 2 * (gradients[n] - g).abs().max() + 1e-6 * g.abs().max()
            assert (found[n] - g).abs().max() <= bound
    assert set(codes(model)) == {Code.LAYER_FROZEN if wanted == "norm" else Code.FUSED}


def test_norm_with_frozen_layers_on_request():
    model, x = network("norm")
    x.requires_grad_()  # else the first layer needs no graph
    _, gradients = run(model, x)
    with options(fuse_frozen_layers=True):
        turn_on(model)
        for _ in range(2):
            # One block's input is the network's, the other's the first ReLU's result, which that
            # ReLU has a mask of besides.
            assert saved_bytes(model, x) == ACTIVATION + 2 * MASK
            torch.testing.assert_close(run(model, x)[1], gradients)
    assert codes(model) == [Code.FUSED] * 2


def test_norm_without_a_layer():
    """A frozen one saves nothing; one that is trained saves its input."""
    model = Fn(lambda m, x: m.bn(m.conv(x).sin()) + m.bn(x))
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    model.bn.requires_grad_(False)
    expected, gradients = run(model, x)
    before = saved_bytes(model, x)
    turn_on(model)
    assert before - saved_bytes(model, x) == x.nbytes  # that of sin(conv(x)); ``x`` is the input
    got, found = run(model, x)
    assert codes(model) == [Code.SHAPE_ONLY] * 2
    assert [r.bytes_saved for r in decisions(model)] == [x.nbytes, x.nbytes]
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    torch.testing.assert_close(found, gradients)


# Who takes a ReLU's result, and whether that saves it.
TAKERS = {
    "layer": (lambda m, y: m.conv(y), True),
    "frozen": (lambda m, y: F.conv2d(y, m.conv.weight.detach()), False),
    "sum": (lambda m, y: y + 1, False),
    "product": (lambda m, y: y * m.bn.weight[:, None, None], True),
    "max_pool": (lambda m, y: F.max_pool2d(y, 2), False),
    "avg_pool": (lambda m, y: F.avg_pool2d(y, 2), True),
    "norm": (lambda m, y: m.bn(y), True),
    "list": (lambda m, y: torch.stack([y, y]), True),
    "two": (lambda m, y: (y + 1).sum() + y.exp().sum(), True),
}


@pytest.mark.parametrize("name", TAKERS)
def test_a_mask_where_nobody_else_saves_the_result(name):
    """In the first forward of a network that trains convolutions all ReLUs save their result."""
    take, is_saved = TAKERS[name]
    masked = []

    def forward(m, x):
        y = F.relu(m.bn(m.conv(x)))
        with torch._C.DisableTorchFunction():
            saved = y.grad_fn._saved_result  # of a mask, ones
            masked.append(bool((saved != y).any()))
        return take(m, y)

    model, x = Fn(forward), torch.randn(2, 4, 8, 8)
    expected, gradients = run(model, x)
    turn_on(model)
    for _ in range(3):
        got, found = run(model, x)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        torch.testing.assert_close(found, gradients)
    assert masked == [False, False, not is_saved, not is_saved]


SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-45, 2.0, -2.0]


def masked_relu(x, inplace=False):
    with saves_mask():
        return F.relu(x, inplace)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inplace", [False, True])
def test_relu_bits(dtype, inplace):
    pairs = torch.tensor(list(itertools.product(SPECIAL, SPECIAL)), dtype=dtype)

    def bits(function):
        x = pairs[:, 0].clone().requires_grad_()
        y = function(x * 1, inplace)
        y.backward(pairs[:, 1])
        return torch.stack([y.detach(), x.grad]).view(torch.uint8)

    assert torch.equal(bits(masked_relu), bits(F.relu))


POOLS = {
    "plain": ((4, 9, 9), {"kernel_size": 2}),
    "overlapping": ((4, 9, 9), {"kernel_size": 3, "stride": 2, "padding": 1}),
    "ceil": ((4, 10, 9), {"kernel_size": (3, 2), "stride": 2, "ceil_mode": True}),
    "dilated": ((4, 9, 12), {"kernel_size": 2, "dilation": (2, 3), "stride": 1}),
    "3d": ((4, 5, 6, 7), {"kernel_size": 2, "stride": (1, 2, 3)}),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", POOLS)
def test_max_pooling_saves_indices_alone(name, channels_last):
    sizes, kwargs = POOLS[name]
    pool = F.max_pool2d if len(sizes) == 3 else F.max_pool3d
    last = torch.channels_last if len(sizes) == 3 else torch.channels_last_3d
    model = Fn(lambda m, x: pool(x.to(memory_format=last) if channels_last else x * 1, **kwargs))
    x = torch.randn(2, *sizes, dtype=torch.float64).requires_grad_()
    expected, before = run(model, x), saved_bytes(model, x)
    turn_on(model)
    got = run(model, x)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert got[1]["input0"].stride() == expected[1]["input0"].stride()
    assert before - saved_bytes(model, x) == x.nbytes  # a copy of it
    assert torch.autograd.gradcheck(model, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(model, (x,), fast_mode=True)


def test_relu_gradgradcheck():
    x = torch.randn(3, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(masked_relu, (x,))
    assert torch.autograd.gradgradcheck(masked_relu, (x,))


@pytest.mark.parametrize("name", LAYERS)
def test_frozen_layers(name):
    """Gradients of input and bias, and theirs, without the input."""
    torch.manual_seed(0)
    m = LAYERS[name]().double()
    x = example_input(m).double().requires_grad_()
    m.weight.requires_grad_(False)
    leaves = [x, *([] if m.bias is None else [m.bias])]

    def call(x, *bias):
        parameters = {"bias": bias[0]} if bias else {}
        with saves_shape_only(x):
            return torch.func.functional_call(m, parameters, x)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(*leaves)
    assert {t.data_ptr() for t in saved} == {m.weight.data_ptr()}


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [*itertools.product(*[(1, 2, 3)] * 2, (0, 1), (1, 2))],
)
def test_geometries(kernel, stride, padding, dilation):
    torch.manual_seed(0)
    for size, transposed in itertools.product((7, 8), (False, True)):
        make = nn.ConvTranspose2d if transposed else nn.Conv2d
        m = make(4, 6, kernel, stride, padding, dilation=dilation, groups=2).double()
        if transposed:
            m.output_padding = (max(stride, dilation) - 1, 0)
        m.requires_grad_(False)
        x = torch.randn(2, 4, size, size, dtype=torch.float64, requires_grad=True)
        y = m(x)
        dy = torch.randn_like(y)
        (expected,) = torch.autograd.grad(y, x, dy)
        with saves_shape_only(x):
            got = m(x)
        torch.testing.assert_close(torch.autograd.grad(got, x, dy)[0], expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(reentrant):
    model, x = network("input")
    expected, gradients = run(model, x)
    turn_on(model)
    outer = Fn(lambda m, x: checkpoint(model, x, use_reentrant=reentrant))
    for _ in range(2):
        got, found = run(outer, x, parameters={})
        assert torch.equal(got[0], expected[0])
        torch.testing.assert_close(found, gradients)


def test_relu_of_what_must_not_be_written_to():
    model = Fn(lambda m, x: F.relu_(x))
    turn_on(model.requires_grad_(False))
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        model(torch.randn(2, 4, 6, 6, requires_grad=True))
    view = Fn(lambda m, x: F.relu_((x * 1)[:, :2]))
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    expected = run(view, x)
    assert run(turn_on(view.requires_grad_(False)), x)[0][0].equal(expected[0][0])


class Stop(torch.autograd.Function):
    """Sends no gradient on."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, g):
        return None


class Centred(nn.Module):
    def forward(self, w):
        return w - w.mean((1, 2, 3), keepdim=True)


def centred_and_frozen():
    conv = nn.Conv2d(4, 4, 3).requires_grad_(False)
    nn.utils.parametrize.register_parametrization(conv, "weight", Centred())
    return nn.Sequential(nn.Conv2d(4, 4, 1), conv, nn.BatchNorm2d(4))


def unfreeze_between(m, x):
    y = m.conv(x)
    m.conv.requires_grad_(True)
    y = m.bn(y)
    m.conv.requires_grad_(False)
    return y


# A model, and the shape of its input.
AS_IN_EVAL = {
    "linear_relu_": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Flatten(0, 1)),
        (2, 3, 4),
    ),
    "max_pool3d": (lambda: nn.Sequential(nn.Conv3d(3, 4, 1), nn.MaxPool3d(2)), (1, 3, 4, 4, 4)),
    "relu_of_weight": (lambda: Fn(lambda m, x: m.bn(F.conv2d(x, F.relu(m.conv.weight)))), None),
    "numpy_sizes": (lambda: Fn(lambda m, x: F.max_pool2d(m.conv(x), np.int64(2))), None),
    "numpy_stride": (
        lambda: Fn(lambda m, x: F.conv2d(x, m.conv.weight, None, np.int64(2))),
        None,
    ),
    "computed_frozen_weight": (centred_and_frozen, None),
    "unfrozen_between": (lambda: Fn(unfreeze_between), None),
    "no_gradient": (lambda: Fn(lambda m, x: Stop.apply(F.relu(m.bn(m.conv(x))))), None),
    "no_gradient_of_pool": (lambda: Fn(lambda m, x: Stop.apply(F.max_pool2d(m.conv(x), 2))), None),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", AS_IN_EVAL)
def test_as_in_eval(name, frozen, autocast):
    """Results, their dtypes, and which gradients there are; under hooks that save copies."""
    torch.manual_seed(0)
    make, shape = AS_IN_EVAL[name]
    model = nn.Sequential(make(), nn.Identity())
    if name == "linear_relu_":
        model.append(nn.BatchNorm1d(4))
    elif name == "max_pool3d":
        model.append(nn.BatchNorm3d(4))
    spread_statistics(model).eval()
    for p in model.parameters() if frozen else ():
        p.requires_grad_(p.ndim == 1)
    x = torch.randn(shape or (2, 4, 8, 8), requires_grad=True)

    def step():
        hooks = torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return run(model, x)

    (expected,), gradients = step()
    turn_on(model)
    for _ in range(2):
        (got,), found = step()
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
        assert found.keys() == gradients.keys()
        for n, g in gradients.items():
            atol = (0.02 if autocast else 1e-5) * g.abs().max().item()
            torch.testing.assert_close(found[n], g, rtol=0, atol=atol)


def test_errors_of_batch_norms_are_evals():
    model = Fn(lambda m, x: F.batch_norm(x.sum((0, 2, 3)), m.bn.running_mean, m.bn.running_var))
    turn_on(model)
    with pytest.raises(RuntimeError, match="should contain"):
        model(torch.randn(2, 4, 8, 8, requires_grad=True))
