"""Graphs that folding could get wrong, each with the code of its refusal, or folded and right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from passes.forward_folding.folding import (
    bump,
    check_residual_written_before_relu,
    codes,
    compiled,
    folded,
    needs_onednn,
)
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop
from torch.testing._internal.two_tensor import TwoTensor
from torch.torch_version import TorchVersion

VERSION = TorchVersion(torch.__version__)


def scaled(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    return F.conv2d(x, w) * s


def scaled_by(*constants: float):
    def fn(x: Tensor, w: Tensor) -> Tensor:
        y = F.conv2d(x, w)
        for c in constants:
            y = y * c if c else y / c
        return y + 1

    return fn


@pytest.mark.parametrize(
    "constants",
    [(1e20, 1e20), (1e-20, 1e-30), (1e30, 1e30, 1e-30), (float("inf"),), (float("nan"),), (0.0,)],
)
def test_constants_that_do_not_fit_together(constants):
    """As written they meet the activations one by one, which may be small or large."""
    x = torch.randn(1, 3, 4, 4) * (1e-20 if constants[0] > 1 else 1e20)
    w = torch.randn(4, 3, 1, 1)
    fn = scaled_by(*constants)
    out, records = folded(fn, x, w)
    assert codes(records) == ["CONSTANT_RANGE"]
    torch.testing.assert_close(out, fn(x, w), equal_nan=True)


def test_mixed_dtypes():
    """A float32 layer whose affine map is in float64 keeps that precision."""
    args = torch.randn(1, 3, 4, 4), torch.randn(4, 3, 1, 1), torch.randn(4, 1, 1).double()
    out, (record,) = folded(scaled, *args)
    assert record.code.name == "UNSUPPORTED_DTYPE"
    assert record.detail == "torch.float32 and torch.float64"
    torch.testing.assert_close(out, scaled(*args), rtol=0, atol=0)


def test_float16():
    """A weight scaled by 1/sqrt(variance) may not fit."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)).eval().half()
    with torch.no_grad():
        model[1].running_var.fill_(0)
        model[1].weight.fill_(60000)
    out, records = folded(model, torch.zeros(1, 3, 4, 4, dtype=torch.float16))
    assert codes(records) == ["FLOAT16_RANGE"]
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.float32, torch.int8),
        (torch.bfloat16, torch.int8),
        (torch.bfloat16, torch.float8_e4m3fn),
    ],
)
def test_quantized_weights_are_left_to_inductor(dtype, stored):
    """Its patterns for integer weights look for the scale after the product."""
    torch.manual_seed(0)
    x, w, s = torch.randn(8, 16, dtype=dtype), torch.randn(4, 16) * 20, torch.randn(4, dtype=dtype)
    w = w.to(stored)
    for fn in (
        lambda x, w, s: F.linear(x, w.to(x.dtype)) * s,
        lambda x, w, s: F.conv1d(x[..., None], (w.to(x.dtype) - 1)[..., None]) * s[:, None],
    ):
        out, records = folded(fn, x, w, s)
        assert codes(records) == ["QUANTIZED"]
        torch.testing.assert_close(out, fn(x, w, s))


def writes_between(x, w, s):
    y = F.conv2d(x, w)
    bump(w)
    return y * s


def test_write_between():
    """Moved past the write, the layer would read the new weight."""
    torch.manual_seed(0)
    x, w, s = torch.randn(1, 3, 4, 4), torch.randn(4, 3, 1, 1), torch.randn(4, 1, 1)
    expected = writes_between(x, w.clone(), s)
    out, records = folded(writes_between, x, w.clone(), s)
    assert codes(records) == ["INPUT_MUTATED"]
    torch.testing.assert_close(out, expected)


def test_write_elsewhere():
    """Between a layer and an activation of several calls is nothing: a later write is no reason."""
    torch.manual_seed(0)
    x, w, n = torch.randn(1, 3, 4, 4), torch.randn(4, 3, 1, 1), torch.zeros(3)

    def fn(x, w, n):
        y = F.silu(F.conv2d(x, w))
        bump(n)
        return y

    out, records = folded(fn, x, w, n)
    assert codes(records) == ["FOLDED"]
    torch.testing.assert_close(out, fn(x, w, n), rtol=1e-4, atol=1e-4)


def test_input_that_is_written_to():
    """The write reaches the caller's tensor, not a copy for oneDNN; and comes after the layer."""
    torch.manual_seed(0)
    args = torch.randn(2, 3, 7, 7), torch.randn(6, 3, 3, 3), torch.rand(6, 1, 1)

    def fn(x, w, s):
        before = F.conv2d(x, w) * s
        x.add_(1)
        after = F.conv2d(x, w).relu()
        return before, after

    mine, expected = [t.clone() for t in args], [t.clone() for t in args]
    out, records = compiled(fn, *mine)
    assert codes(records) == ["FOLDED", "FOLDED"]
    torch.testing.assert_close(out, fn(*expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mine, expected)


@needs_onednn
def test_the_residual_is_written_to_before_relu():
    check_residual_written_before_relu()


@pytest.mark.parametrize("sliced", [True, False])
def test_a_view_of_what_is_generated_from_the_layer_is_returned(sliced):
    """Generated code lays its result out as its input is: the part is one of a copy then."""

    def fn(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        y = F.leaky_relu(F.conv2d(x, w * 2) * s + x.mean(), 0.1)
        return (y + y.sin())[:, :1] if sliced else y + y.sin()

    args = torch.randn(1, 4, 1, 1), torch.randn(4, 4, 1, 1), torch.randn(4, 1, 1)
    out, records = folded(fn, *args)
    assert codes(records) == ["FOLDED"]
    torch.testing.assert_close(out, fn(*args))


@pytest.mark.parametrize("relu", [False, True])
def test_a_subclass_made_of_the_result_is_returned(relu):
    """Its parts have equal strides, of which Inductor alone restores the first one's only."""
    torch.manual_seed(0)
    x, w, s = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3), torch.randn(4, 1, 1)

    def fn(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        y = F.conv2d(x, w) * s
        return F.relu(y) if relu else y

    args = x, TwoTensor(w, w + 1), s
    out, records = compiled(fn, *args)
    assert codes(records) == ["FOLDED"] * 2
    for part in (0, 1):
        got, expected = ((t.a, t.b)[part] for t in (out, fn(*args)))
        torch.testing.assert_close(got, expected)


RETURNED = {
    "views": lambda y: (y.view(y.shape[0], -1), y.view(y.shape[0], 8, -1)),
    "slices": lambda y: (y[:, 1:], y[:, :3]),
    "permuted": lambda y: (y.transpose(1, 2), y.permute(0, 2, 3, 1)),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("views", RETURNED.values(), ids=RETURNED)
def test_views_of_a_result_that_has_a_gradient_are_returned(views, dynamic):
    """AOTAutograd returns the tensor that they are views of, and makes them of it each call."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)).eval(), torch.randn(2, 4, 6, 5)

    def fn(x: Tensor) -> tuple[Tensor, ...]:
        return views(model(x).relu())

    out, records = compiled(fn, x, grad=True, dynamic=dynamic)
    is_sliced = views is RETURNED["slices"]
    assert codes(records) == ["VIEW_RETURNED" if dynamic and is_sliced else "FOLDED"]
    torch.testing.assert_close(out, fn(x), rtol=1e-4, atol=1e-4, check_stride=True)


def test_random_numbers_of_a_library():
    """It draws them in the order of memory; Inductor's own kernels do not."""
    model, x = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)).eval(), torch.randn(2, 4, 6, 5)

    def fn(x: Tensor) -> Tensor:
        return F.dropout(model(x).relu(), 0.5)

    with torch._inductor.config.patch(fallback_random=True):
        torch.manual_seed(0)
        out, records = compiled(fn, x)
    torch.manual_seed(0)
    assert codes(records) == ["FOLDED"]
    torch.testing.assert_close(out, fn(x).detach(), rtol=1e-4, atol=1e-4)


@torch.library.custom_op("convbn_test::memory", mutates_args=())
def memory(x: Tensor) -> Tensor:
    """The elements of ``x`` as they lie in memory."""
    return x.as_strided((x.numel(),), (1,)).clone()


@memory.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.numel())


def strided(y: Tensor) -> Tensor:
    return y.as_strided((2, 4), (1, 2)).sin()


def carried(y: Tensor) -> Tensor:
    return while_loop(lambda i, y: i < 2, lambda i, y: (i + 1, y.sin()), (torch.tensor(0), y))[1]


# Of y, a folded layer's result, which oneDNN makes channels-last; ``layer`` is another one.
OBSERVE = {
    "as_strided": lambda y, layer: strided(y),
    "of_what_is_generated": lambda y, layer: strided(y.sin()),
    "of_a_layer": lambda y, layer: strided(layer(y)),
    "of_a_transposed_layer": lambda y, layer: strided(F.conv_transpose2d(y, layer.weight)),
    "of_one_of_two_results": lambda y, layer: strided(F.adaptive_max_pool2d(y, 3)),
    "of_a_view": lambda y, layer: strided(y[:, 1:].sin()[:, 1:]),
    "pooled_to_one": lambda y, layer: F.adaptive_avg_pool2d(y, 1).as_strided((2, 3), (6, 2)),
    "custom_operator": lambda y, layer: memory(y),
    "custom_operator_of_a_layer": lambda y, layer: memory(layer(y)),
    "complex": lambda y, layer: torch.view_as_complex(y[..., None].expand(2, 6, 6, 8, 2) + 1).abs(),
    "as_strided_copy": lambda y, layer: torch.as_strided_copy(y, (2, 4), (1, 2)).sin(),
    "other_dtype_copy": lambda y, layer: torch.view_copy(y * 0 + 3, torch.float64).sin(),
    "other_dtype": lambda y, layer: (y.contiguous() * 0 + 3).view(torch.float64).sin(),
    "loop": lambda y, layer: carried(y),
    "loop_after_a_layer": lambda y, layer: carried(layer(y)),
    "returned": lambda y, layer: (y[:, 1:], *y.chunk(2, 1), *y.unbind(0), y.diagonal(0, 2, 3)),
}


CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last
OBSERVED = [(name, False, CONTIGUOUS) for name in OBSERVE]
OBSERVED += [(name, False, LAST) for name in ("as_strided", "pooled_to_one", "returned")]
OBSERVED += [
    (name, True, CONTIGUOUS)
    for name in ("as_strided", "of_a_layer", "custom_operator", "complex", "loop", "pooled_to_one")
]
if VERSION < "2.13":  # as_strided of a slice of something stored loses the slice's offset
    OBSERVED.remove(("of_a_view", False, CONTIGUOUS))


@pytest.mark.parametrize(("name", "dynamic", "fmt"), OBSERVED)
def test_what_observes_strides(name, dynamic, fmt):
    """It sees the strides that eager mode has, though the layer's kernel chooses other ones."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Conv2d(3, 6, 3, bias=False), nn.Conv2d(6, 6, 3)]).to(
        memory_format=fmt
    )
    x, s = torch.randn(2, 3, 8, 10).contiguous(memory_format=fmt), nn.Buffer(torch.rand(6, 1, 1))

    def fn(x: Tensor) -> object:
        return OBSERVE[name]((model[0](x) * s).relu(), model[1])

    with torch.no_grad():
        expected = fn(x)
    out, records = compiled(fn, x, dynamic=dynamic)
    is_refused = dynamic and name == "pooled_to_one"  # as_strided of which is returned
    assert codes(records)[0] == ("VIEW_RETURNED" if is_refused else "FOLDED")
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4, check_stride=not dynamic)


def test_weights_of_dynamic_shape():
    torch.manual_seed(0)
    args = torch.randn(2, 3, 7, 8), torch.randn(6, 3, 3, 3), torch.rand(6, 1, 1)

    def fn(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        return (F.conv2d(x, w) * s).relu()

    out, records = compiled(fn, *args, dynamic=True)
    assert codes(records) == ["FOLDED"]
    torch.testing.assert_close(out, fn(*args), rtol=1e-4, atol=1e-4)


def in_cond(x, w, s):
    return torch.cond(
        x.sum() > 0,
        lambda x, w, s: (F.conv2d(x, w) * s).relu(),
        lambda x, w, s: x[:, :1, 1:-1, 1:-1] * s,
        (x, w, s),
    )


def in_loop(x, w, s):
    def body(i, y):
        return i + 1, (F.conv2d(y, w[:3], padding=1) * s[:3]).relu()

    return while_loop(lambda i, y: i < 2, body, (torch.zeros((), dtype=torch.int64), x))[1]


@torch.compiler.nested_compile_region
def _block(x, w, s):
    return (F.conv2d(x, w) * s).relu()


def in_region(x, w, s):
    return _block(x, w, s) + _block(x.sin(), w, s) + (F.conv2d(x.cos(), w) * s).relu()


@pytest.mark.parametrize(
    ("fn", "count", "outside"), [(in_cond, 1, 0), (in_loop, 1, 0), (in_region, 1, 1)]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_inside_a_higher_order_operator(fn, count, outside, sign):
    """Its body has to have the strides that were traced; the graph around it is folded."""
    torch.manual_seed(0)
    args = (torch.randn(2, 3, 7, 7).abs() * sign, torch.randn(6, 3, 3, 3), torch.rand(6, 1, 1))
    out, records = compiled(fn, *args)
    assert sorted(codes(records)) == ["FOLDED"] * outside + ["INSIDE_HIGHER_ORDER_OP"] * count
    torch.testing.assert_close(out, fn(*args), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(VERSION < "2.12", reason="where a size depends on data, Dynamo gives up")
def test_no_guard_on_a_size_that_depends_on_data():
    conv = torch.nn.Conv2d(3, 4, 1)

    def fn(x: Tensor, keep: Tensor) -> Tensor:
        return conv(x[:, :, keep.nonzero().flatten()]).relu()

    args = torch.randn(1, 3, 6, 5), torch.tensor([1, 0, 1, 1, 0, 1])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        out, records = folded(fn, *args)
    assert codes(records) == ["FOLDED"]
    torch.testing.assert_close(out, fn(*args))


def test_batch_that_depends_on_data():
    linear, scale = torch.nn.Linear(4, 4), torch.randn(4)

    def fn(x: Tensor, keep: Tensor) -> Tensor:
        x = x[keep.nonzero().flatten()]
        return (linear(x[None]) * scale)[0].clamp(-1, 1) + x

    args = torch.randn(6, 4), torch.tensor([1, 0, 1, 1, 0, 1])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        out, records = folded(fn, *args)
    assert codes(records) == ["FOLDED"]
    torch.testing.assert_close(out, fn(*args))
