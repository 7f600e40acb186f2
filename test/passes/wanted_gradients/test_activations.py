"""Rule 2: masks of activations from their outputs, to the bit, special values included."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from joint_graphs import run_pass
from passes.wanted_gradients.wanted import check_bits, codes
from torch import nn
from torch.torch_version import TorchVersion

from convbn_inductor_pass import Code, explain, options, testing

ACTIVATIONS = {
    "relu6": nn.ReLU6(),
    "relu6_inplace": nn.ReLU6(inplace=True),
    "hardtanh": nn.Hardtanh(),
    "hardtanh_bounds": nn.Hardtanh(-0.25, 2.0),
    "leaky_relu": nn.LeakyReLU(0.1),
    "rrelu": nn.RReLU().eval(),
    "threshold": nn.Threshold(0.5, 0.25),
    "threshold_same": nn.Threshold(0.5, 0.5),
    "threshold_inplace": nn.Threshold(0.0, -1.0, inplace=True),
}
# Nothing to gain, or not the same for every input.
OTHERS = {
    "relu": nn.ReLU(),
    "leaky_relu_inplace": nn.LeakyReLU(0.2, inplace=True),  # autograd takes the output itself
    "elu": nn.ELU(),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "silu": nn.SiLU(),
    "leaky_relu_negative": nn.LeakyReLU(-0.1),
    "leaky_relu_zero": nn.LeakyReLU(0.0),
    "threshold_above": nn.Threshold(0.5, 0.75),
    "softshrink": nn.Softshrink(),
}


def network(activation, *, frozen=False):
    """Its output is what the second layer's weight gradient needs."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), activation, nn.Conv2d(8, 4, 1)).eval()
    model[2].requires_grad_(not frozen)
    return model


@pytest.fixture(name="x")
def _x():
    return torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1)) * 4


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("autocast", [False, True])
def test_same_bits(name, autocast, x):
    compared = check_bits(network(ACTIVATIONS[name]), x, autocast=autocast)
    assert compared.codes == [("activation", Code.MASK_FROM_OUTPUT)]


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_special_values(name, dtype):
    """At, just below and just above each constant; infinities, NaN, zeros, the smallest numbers."""
    activation = ACTIVATIONS[name]
    edges = [-1.0, -0.25, 0.0, 0.25, 0.5, 1.0, 2.0, 6.0]
    points = torch.tensor(edges, dtype=dtype)
    up, down = (torch.full_like(points, v) for v in (math.inf, -math.inf))
    info = torch.finfo(dtype)
    smallest = torch.tensor([info.smallest_normal * info.eps, info.tiny], dtype=dtype)
    special = torch.tensor([math.inf, -math.inf, math.nan, -0.0, info.max, info.min], dtype=dtype)
    neighbours = [torch.nextafter(points, up), torch.nextafter(points, down)]
    values = torch.cat([points, *neighbours, smallest, -smallest, special])
    z = values.repeat(8, 1).requires_grad_()
    second = torch.randn(4, values.numel(), dtype=dtype, requires_grad=True)

    def fn(z, second):
        # Not recomputed from z, which is in memory: that is no pointwise call.
        return F.linear(activation(z.flip(0)), second)

    compared = check_bits(fn, z, second)
    assert compared.codes == [("activation", Code.MASK_FROM_OUTPUT)]


@pytest.mark.parametrize("name", OTHERS)
def test_left_as_written(name, x):
    compared = check_bits(network(OTHERS[name]), x)
    assert compared.codes == []
    assert all(result.before == result.after for result in compared.results)


def test_clamp_has_a_gradient_at_its_bounds(x):
    """Up to 2.13: its mask is z >= lo and z <= hi, which the output does not tell."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1))

    def fn(x):
        return model[1](model[0](x).clamp(0, 6))

    has_gradient = torch.zeros(1, requires_grad=True)
    has_gradient.clamp(0, 6).sum().backward()
    expected = [] if has_gradient.grad.item() else [("activation", Code.MASK_FROM_OUTPUT)]
    assert check_bits(fn, x.requires_grad_()).codes == expected


def test_constants_that_are_rounded_away(x):
    """0.1 is no bfloat16: z = 0.1 and y may lie on different sides of it."""
    model = network(nn.Hardtanh(-0.1, 0.1))
    assert check_bits(model, x, autocast=True).codes == []
    half = network(nn.Hardtanh(-0.1, 0.1)).double()
    assert check_bits(half, x.double()).codes == [("activation", Code.MASK_FROM_OUTPUT)]


def test_output_not_saved(x):
    assert check_bits(network(nn.ReLU6(), frozen=True), x).codes == [
        ("activation", Code.OUTPUT_NOT_SAVED),
        ("shape", Code.SHAPE_ONLY),
    ]


def test_returned_output_is_not_saved():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU6()), torch.randn(4, 3, 32, 32)
    explanation = explain(model, x)
    assert ("activation", Code.OUTPUT_NOT_SAVED) in codes(model, x)
    less = explanation.saved["eval"].new_bytes - explanation.saved["tune"].new_bytes
    assert sum(r.bytes_saved for r in explanation.records) == less == 4 * 8 * 32 * 32 * 7 // 8


class UsedTwice(nn.Module):
    """The activation's input is given to another layer, too, which needs it in backward."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(c, 8, 1) for c in (3, 8, 8))

    def forward(self, x):
        z = self.first(x)
        return self.second(F.relu6(z)) + self.third(z)


def test_input_saved_anyway(x):
    assert check_bits(UsedTwice(), x).codes == [("activation", Code.SAVED_ANYWAY)]


def test_output_used_by_other_layers(x):
    class Branches(UsedTwice):
        def forward(self, x):
            y = F.relu6(self.first(x))
            return self.second(y) + self.third(y)

    assert check_bits(Branches(), x).codes == [("activation", Code.MASK_FROM_OUTPUT)]


def test_denied(x):
    model = network(nn.ReLU6())
    with options(deny=("1",)):
        assert check_bits(model, x).codes == [("activation", Code.DENIED)]
    with options(allow=("1",)):
        assert check_bits(model, x).codes == [("activation", Code.MASK_FROM_OUTPUT)]


class Functional(nn.Module):
    def forward(self, x):
        return F.relu6(x)


def test_dynamic_shapes(x):
    compared = check_bits(network(Functional()), x, dynamic=True)
    assert compared.codes == [("activation", Code.MASK_FROM_OUTPUT)]


def test_bounds_that_are_inputs(x):
    """With dynamic=True, Dynamo makes inputs of floats that modules hold."""
    assert check_bits(network(nn.ReLU6()), x, dynamic=True).codes == []


def test_saves_no_mask():
    model, x = network(nn.ReLU6()), torch.randn(4, 3, 32, 32)
    with options(deny=("*",)):
        before = explain(model, x).saved["tune"]
    after = explain(model, x).saved["tune"]
    assert before.bytes_of("mask") == 4 * 8 * 32 * 32
    assert after.bytes_of("mask") == 0
    assert after.new_bytes == before.new_bytes - before.bytes_of("mask")


def test_graph(x):
    (result,) = run_pass(network(nn.ReLU6()), x)
    masks = r"(?:le|ge)_?\w* = torch.ops.aten.(?:le|ge).Scalar\((\w+), "
    assert set(re.findall(masks, result.before)) == {"convolution"}
    assert set(re.findall(masks, result.after)) == {"clamp_max"}


def test_real_inductor(x):
    model = network(nn.ReLU6(inplace=True))
    runs = []
    for flag in (True, False):
        with testing.fresh_compile(flag=flag):
            compiled = torch.compile(model)
            runs.append(
                testing.outputs_and_gradients(compiled, dict(model.named_parameters()), (x,))
            )
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=0, atol=0)
    # On torch 2.11 other calls are fused with a sum, which then has another order.
    error = 1e-6 if TorchVersion(torch.__version__) < "2.13" else 0
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=error, atol=error)
    assert codes(model, x) == [("activation", Code.MASK_FROM_OUTPUT)]
