"""Rule 1: what backward reads the shape of is not saved."""

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from common import LAYERS, example_input, fuzz
from hypothesis import strategies as st
from joint_graphs import run_pass
from passes.wanted_gradients.wanted import check_bits, codes, compare
from torch import nn

from convbn_inductor_pass import Code, explain, options, testing
from convbn_inductor_pass.passes.wanted_gradients.site import READ_THE_SHAPE

SHAPE_ONLY = ("shape", Code.SHAPE_ONLY)
CONVS = {
    (False, 1): nn.Conv1d,
    (False, 2): nn.Conv2d,
    (False, 3): nn.Conv3d,
    (True, 1): nn.ConvTranspose1d,
    (True, 2): nn.ConvTranspose2d,
    (True, 3): nn.ConvTranspose3d,
}


class FrozenLayer(nn.Module):
    """A layer without trained weight on a computed input; its bias may be trained."""

    def __init__(self, layer, bias=False):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        if layer.bias is not None:
            layer.bias.requires_grad_(bias)

    def forward(self, x):
        return self.layer(torch.sin(x))


def assert_right(model, x, **kwargs):
    """Gradients are within twice eval mode's own error of those in float64."""
    compared = compare(model, x, **kwargs)
    _, exact = testing.outputs_and_gradients(
        model.double(), dict(model.named_parameters()), (x.detach().double().requires_grad_(),)
    )
    model.float()
    for name, value in exact.items():
        got, plain = compared.gradients[name], compared.plain_gradients[name]
        assert got.dtype == plain.dtype
        assert got.stride() == plain.stride()
        scale = value.abs().max().clamp(min=1e-30)
        error, allowed = ((t - value).abs().max() / scale for t in (got, plain))
        assert error <= 2 * allowed + 8 * torch.finfo(torch.float32).eps
    return compared


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", [n for n in LAYERS if n != "linear"])
def test_layers(name, bias):
    model = FrozenLayer(LAYERS[name](), bias)
    assert_right(model, example_input(model.layer, requires_grad=True))
    assert SHAPE_ONLY in codes(model, example_input(model.layer, requires_grad=True))


@st.composite
def layers(draw):
    """A convolution of any geometry that PyTorch takes, and an input for it."""
    transposed, rank = draw(st.booleans()), draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 4]))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    kernel, stride, dilation = each(1, 4), each(1, 3), each(1, 3)
    padding = each(0, 4)
    arguments = {
        "stride": stride,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    if transposed:
        most = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
        arguments["output_padding"] = tuple(draw(st.integers(0, m)) for m in most)
    layer = CONVS[transposed, rank](
        4, draw(st.sampled_from([4, 8])), kernel, padding=padding, **arguments
    )
    sizes = each(1, 9 if rank < 3 else 6)
    x = torch.randn(draw(st.integers(1, 3)), 4, *sizes)
    try:
        out = layer(x)
    except RuntimeError:
        hypothesis.reject()
    hypothesis.assume(out.numel() > 0)
    return layer, x


@fuzz(40)
@hypothesis.given(layers(), st.booleans())
def test_any_geometry(drawn, bias):
    layer, x = drawn
    assert_right(FrozenLayer(layer, bias), x.requires_grad_())


def test_output_padding_as_large_as_the_stride():
    """A transposed layer may have that if it is dilated: no plain convolution gives x's size."""
    layer = nn.ConvTranspose2d(4, 6, 3, stride=1, dilation=3, output_padding=2)
    assert_right(FrozenLayer(layer), torch.randn(2, 4, 5, 5, requires_grad=True))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dynamic", [False, True])
def test_dynamic_shapes_and_channels_last(stride, dynamic):
    model = FrozenLayer(nn.Conv2d(4, 8, 3, stride=stride, padding=1))
    x = torch.randn(3, 4, 9, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
    compared = assert_right(model, x, dynamic=dynamic)
    assert compared.codes == [SHAPE_ONLY]


def test_autocast():
    model = FrozenLayer(nn.Conv2d(4, 8, 3, padding=1))
    compared = compare(model, torch.randn(2, 4, 8, 8, requires_grad=True), autocast=True)
    assert SHAPE_ONLY in compared.codes
    torch.testing.assert_close(compared.gradients, compared.plain_gradients)


class Poolings(nn.Module):
    """Operators of the table, on a computed input of rank 3 to 5."""

    def __init__(self, *calls):
        super().__init__()
        self.calls = calls

    def forward(self, x):
        return tuple(call(torch.sin(x)) for call in self.calls)


THREE, FOUR, FIVE = (2, 4, 7), (2, 4, 7, 8), (2, 3, 5, 4, 5)
OPERATORS = {
    aten_name: (call, shape)
    for aten_name, call, shape in (
        ("_adaptive_avg_pool2d_backward", lambda t: F.adaptive_avg_pool2d(t, 3), FOUR),
        ("_adaptive_avg_pool3d_backward", lambda t: F.adaptive_avg_pool3d(t, 2), FIVE),
        ("adaptive_max_pool2d_backward", lambda t: F.adaptive_max_pool2d(t, 3), FOUR),
        ("adaptive_max_pool3d_backward", lambda t: F.adaptive_max_pool3d(t, 2), FIVE),
        ("avg_pool2d_backward", lambda t: F.avg_pool2d(t, 2, ceil_mode=True), FOUR),
        ("avg_pool3d_backward", lambda t: F.avg_pool3d(t, 2), FIVE),
        ("max_pool2d_with_indices_backward", lambda t: F.max_pool2d(t, 2), FOUR),
        ("max_pool3d_with_indices_backward", lambda t: F.max_pool3d(t, 2), FIVE),
        ("reflection_pad1d_backward", lambda t: F.pad(t, (1, 2), mode="reflect"), THREE),
        ("reflection_pad2d_backward", lambda t: F.pad(t, (1, 2, 0, 1), mode="reflect"), FOUR),
        ("reflection_pad3d_backward", lambda t: F.pad(t, (1,) * 6, mode="reflect"), FIVE),
        ("replication_pad1d_backward", lambda t: F.pad(t, (1, 2), mode="replicate"), THREE),
        ("replication_pad2d_backward", lambda t: F.pad(t, (1, 2, 0, 1), mode="replicate"), FOUR),
        ("replication_pad3d_backward", lambda t: F.pad(t, (1,) * 6, mode="replicate"), FIVE),
    )
}  # fmt: skip


def test_every_operator_of_the_table_is_tested():
    assert {op._opname for op in READ_THE_SHAPE} == set(OPERATORS)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name, channels_last):
    """Bits are equal whatever stands in for the tensor, also where PyTorch decomposes the call."""
    call, shape = OPERATORS[name]
    x = torch.randn(shape)
    if channels_last:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        x = x.contiguous(memory_format=formats.get(x.dim(), torch.contiguous_format))
    model = Poolings(call)
    compared = check_bits(model, x.requires_grad_())
    (result,) = compared.results
    assert (SHAPE_ONLY in compared.codes) == (f"aten.{name}.default(" in result.before)
    if SHAPE_ONLY in compared.codes:
        assert explain(model, x).saved["tune"].new_bytes < explain(model, x).saved["eval"].new_bytes


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_do_not_read_elements(name):
    """Called directly: with NaN in the place of every element the result is the same."""
    operator = getattr(torch.ops.aten, name).default
    call, shape = OPERATORS[name]
    x = torch.randn(shape, requires_grad=True)
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is operator:
                seen.append((args, kwargs or {}, result))
            return result

    with Spy():
        call(x).sum().backward()
    ((args, kwargs, result),) = seen
    nothing = torch.full_like(args[1], torch.nan)
    again = operator(args[0], nothing, *args[2:], **kwargs)
    torch.testing.assert_close(again, result, rtol=0, atol=0)


class Two(nn.Module):
    """Two layers on one input."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3)

    def forward(self, x):
        y = torch.sin(x)
        return self.first(y) + self.second(y)


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [
        (("first", "second"), [SHAPE_ONLY]),
        (("first",), [("shape", Code.SAVED_ANYWAY)]),
        ((), []),
    ],
)
def test_other_users(frozen, expected):
    model = Two()
    for name in frozen:
        getattr(model, name).weight.requires_grad_(False)
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    compared = compare(model, x)
    assert compared.codes == expected
    if expected != [SHAPE_ONLY]:
        assert all(result.before == result.after for result in compared.results)


def test_empty_outputs():
    """A transposed layer may have one: PyTorch has its gradient, but no convolution of it."""
    layer = nn.ConvTranspose2d(4, 4, 3, padding=2).requires_grad_(False)
    x = torch.randn(2, 4, 4, 2, requires_grad=True)
    assert layer(x).shape == (2, 4, 2, 0)
    assert compare(layer, x).codes == [SHAPE_ONLY]


def test_read_by_a_pointwise_call():
    """Sigmoid's gradient takes its output, which has to be saved."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 4, 1))
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    saved = explain(model.requires_grad_(False), x).saved
    assert saved["tune"].new_bytes == saved["eval"].new_bytes
    assert codes(model, x) == [("shape", Code.SAVED_ANYWAY), SHAPE_ONLY]  # and of the input, x


def test_returned_output_is_saved_anyway():
    layer = nn.Conv2d(4, 8, 3).requires_grad_(False)

    def fn(x):
        y = torch.sin(x)
        return y, layer(y)

    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    assert compare(fn, x).codes == [("shape", Code.SAVED_ANYWAY)]


def test_inputs_are_not_kept_alive():
    """Of a block that is compiled on its own, the input may be what another one computed."""
    layer = nn.Conv2d(4, 8, 3).requires_grad_(False)
    (record,) = (
        r
        for r in explain(lambda x: layer(x), torch.randn(2, 4, 6, 6, requires_grad=True)).records
        if r.kind == "shape"
    )
    assert (record.code, record.bytes_saved) == (Code.SHAPE_ONLY, 0)


def test_denied():
    model = FrozenLayer(nn.Conv2d(4, 8, 3))
    with options(deny=("layer",)):
        compared = compare(model, torch.randn(2, 4, 6, 6, requires_grad=True))
    assert compared.codes == [("shape", Code.DENIED)]
    assert all(result.before == result.after for result in compared.results)


def test_trained_layers_are_left():
    model = FrozenLayer(nn.Conv2d(4, 8, 3)).requires_grad_()
    compared = check_bits(model, torch.randn(2, 4, 6, 6, requires_grad=True))
    assert compared.codes == []


def test_bytes():
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))).requires_grad_(False)
    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    saved = explain(model, x).saved
    assert saved["eval"].new_bytes == 2 * x.nbytes
    assert saved["tune"].new_bytes == 0


def test_graph():
    (result,) = run_pass(
        FrozenLayer(nn.Conv2d(4, 8, 3, stride=2, padding=1)),
        torch.randn(2, 4, 6, 6, requires_grad=True),
    )
    assert "convolution_backward" in result.before
    assert "convolution_backward" not in result.after
    assert "[2, 2], [1, 1], [1, 1], True, [1, 1], 1)" in result.after


def test_real_inductor():
    """Also with a tensor in the place of the input: strided layers of dynamic sizes have that."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2))
    model.append(nn.AvgPool2d(2)).requires_grad_(False)
    x = torch.randn(2, 3, 12, 10, requires_grad=True)
    runs = []
    for flag in (True, False):
        with testing.fresh_compile(flag=flag):
            compiled = torch.compile(model, dynamic=True)
            runs.append(testing.outputs_and_gradients(compiled, {}, (x,)))
    torch.testing.assert_close(runs[0], runs[1])
