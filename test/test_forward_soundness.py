"""Graphs that the kernel half could get wrong, one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_forward import folded
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.torch_version import TorchVersion

import convbn_inductor_pass as cbn
from convbn_inductor_pass import ForwardCode, _inductor, hook, testing


def test_two_layers_that_are_each_others_operand():
    """A classifier with two heads, as LeViT's, for a batch of one."""
    torch.manual_seed(0)
    args = torch.randn(1, 3), torch.randn(4, 3), torch.randn(4, 3), torch.randn(4)

    def fn(x: Tensor, v: Tensor, w: Tensor, s: Tensor) -> Tensor:
        return (F.linear(x, v) * s + F.linear(x, w) / 3) / 2

    out, records = folded(fn, *args)
    assert any(r.code.folded for r in records)
    torch.testing.assert_close(out, fn(*args))


def scaled_by(*numbers: float):
    def fn(x: Tensor, w: Tensor) -> Tensor:
        y = F.conv2d(x, w)
        for number in numbers:
            y = y * number if number else y / number
        return y + 1

    return fn


@pytest.mark.parametrize(
    "numbers",
    [(1e20, 1e20), (1e-20, 1e-30), (1e30, 1e30, 1e-30), (float("inf"),), (float("nan"),), (0.0,)],
)
def test_constants_that_do_not_fit_together(numbers):
    """As written they meet the activations one by one, which may be small or large."""
    x = torch.randn(1, 3, 4, 4) * (1e-20 if numbers[0] > 1 else 1e20)
    w = torch.randn(4, 3, 1, 1)
    fn = scaled_by(*numbers)
    out, (record,) = folded(fn, x, w)
    assert record.code is ForwardCode.NUMBER_RANGE
    torch.testing.assert_close(out, fn(x, w), equal_nan=True)


@pytest.mark.parametrize("sliced", [True, False])
def test_a_part_of_what_is_generated_from_the_layer_is_returned(sliced):
    """Generated code lays its result out as its input is, and a part of it stays like that."""

    def fn(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        y = F.leaky_relu(F.conv2d(x, w * 2) * s + x.mean(), 0.1)
        return (y + y.sin())[:, :1] if sliced else y + y.sin()

    args = torch.randn(1, 4, 1, 1), torch.randn(4, 4, 1, 1), torch.randn(4, 1, 1)
    out, (record,) = folded(fn, *args)
    assert record.code is (ForwardCode.VIEW_RETURNED if sliced else ForwardCode.FOLDED)
    torch.testing.assert_close(out, fn(*args))


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.float32, torch.int8),
        (torch.bfloat16, torch.int8),
        (torch.bfloat16, torch.float8_e4m3fn),
    ],
)
def test_quantised_weights_are_left_to_inductor(dtype, stored):
    """Its patterns for integer weights look for the scale after the product."""
    torch.manual_seed(0)
    x, w, s = torch.randn(8, 16, dtype=dtype), torch.randn(4, 16) * 20, torch.randn(4, dtype=dtype)
    w = w.to(stored)
    for fn in (
        lambda x, w, s: F.linear(x, w.to(x.dtype)) * s,
        lambda x, w, s: F.conv1d(x[..., None], (w.to(x.dtype) - 1)[..., None]) * s[:, None],
    ):
        out, (record,) = folded(fn, x, w, s)
        assert record.code is ForwardCode.QUANTISED
        torch.testing.assert_close(out, fn(x, w, s))


@torch.library.custom_op("convbn_test::memory", mutates_args=())
def memory(x: Tensor) -> Tensor:
    """The numbers of ``x`` as they lie in memory."""
    return x.as_strided((x.numel(),), (1,)).clone()


@memory.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.numel())


def compiled(fn, *inputs, **options):
    """Under Inductor, folded: the outputs, and records."""
    cbn.clear_records()
    with testing.fresh_compile(), cbn.options(forward="fold"), torch.no_grad():
        out = torch.compile(fn, **options)(*inputs)
    return out, cbn.forward_records()


def test_what_reads_memory_by_its_strides():
    """oneDNN's results are channels-last, whatever the graph says."""
    torch.manual_seed(0)
    x, w, v = torch.randn(2, 3, 7, 7), torch.randn(6, 3, 3, 3), torch.randn(6, 3, 3, 3)
    s, other = torch.rand(6, 1, 1), torch.randn(2, 6, 5, 5)

    def fn(x, w, v, s, other):
        strided = (F.conv2d(x, w) * s).relu().as_strided((2, 4), (1, 2)).sin()
        added = (F.conv2d(x, v) * s + other).relu().as_strided((2, 4), (1, 2)).cos()
        return strided, added, memory((F.conv2d(x, w + 1) * s).relu())

    out, records = compiled(fn, x, w, v, s, other)
    assert {r.code for r in records} == {ForwardCode.STRIDES_USED}
    torch.testing.assert_close(out, fn(x, w, v, s, other), rtol=1e-4, atol=1e-4)


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
    assert [r.code.folded for r in records] == [True, True]
    torch.testing.assert_close(out, fn(*expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mine, expected)


def test_branches_keep_their_strides():
    """torch.cond wants the strides of both branches' results to be the same."""
    torch.manual_seed(0)
    x, w, s = torch.randn(2, 3, 7, 7), torch.randn(6, 3, 3, 3), torch.rand(6, 1, 1)

    def fn(flag, x, w, s):
        return torch.cond(
            flag,
            lambda x, w, s: (F.conv2d(x, w) * s).relu(),
            lambda x, w, s: x[:, :1, 1:-1, 1:-1] * s,
            (x, w, s),
        )

    for flag in (torch.tensor(True), torch.tensor(False)):
        out, records = compiled(fn, flag, x, w, s)
        assert [r.code for r in records] == [ForwardCode.SUBGRAPH]
        torch.testing.assert_close(out, fn(flag, x, w, s), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 1, 1), (1, 1, 1, 1), (2, 3, 8, 8)])
def test_inputs_that_are_contiguous_and_channels_last(shape):
    """oneDNN's result is as its input seems to be, which Inductor cannot see for these."""
    conv = torch.nn.Conv2d(shape[1], 4, 3, padding=2)
    model = torch.nn.Sequential(conv, torch.nn.BatchNorm2d(4), torch.nn.ReLU()).eval()
    x = torch.randn(shape)
    with testing.fresh_compile(), cbn.options(forward="fold"), torch.no_grad():
        torch.testing.assert_close(torch.compile(model)(x), model(x))


@pytest.mark.parametrize("relu", [False, True])
def test_a_subclass_made_of_the_result_is_returned(relu):
    """Its parts have equal strides, of which Inductor restores the first one's only."""
    torch.manual_seed(0)
    x, w, s = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3), torch.randn(4, 1, 1)

    def fn(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        y = F.conv2d(x, w) * s
        return F.relu(y) if relu else y

    args = x, TwoTensor(w, w + 1), s
    with testing.fresh_compile(), cbn.options(forward="fold"):
        cbn.clear_records()
        out = torch.compile(fn)(*args)
    assert [r.code for r in cbn.forward_records()] == [ForwardCode.VIEW_RETURNED] * 2
    for part in (0, 1):
        got, expected = ((t.a, t.b)[part] for t in (out, fn(*args)))
        torch.testing.assert_close(got, expected)


breaks_graphs = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.12", reason="where a size depends on data, Dynamo gives up"
)


@breaks_graphs
def test_no_guard_on_a_size_that_depends_on_data():
    conv = torch.nn.Conv2d(3, 4, 1)

    def fn(x: Tensor, keep: Tensor) -> Tensor:
        return conv(x[:, :, keep.nonzero().flatten()]).relu()

    args = torch.randn(1, 3, 6, 5), torch.tensor([1, 0, 1, 1, 0, 1])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        out, (record,) = folded(fn, *args)
    assert record.code is ForwardCode.FOLDED
    torch.testing.assert_close(out, fn(*args))


def test_batch_that_depends_on_data():
    linear, scale = torch.nn.Linear(4, 4), torch.randn(4)

    def fn(x: Tensor, keep: Tensor) -> Tensor:
        x = x[keep.nonzero().flatten()]
        return (linear(x[None]) * scale)[0].clamp(-1, 1) + x

    args = torch.randn(6, 4), torch.tensor([1, 0, 1, 1, 0, 1])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        out, (record,) = folded(fn, *args)
    assert record.code is ForwardCode.FOLDED
    torch.testing.assert_close(out, fn(*args))


@pytest.mark.skipif(not _inductor.has_onednn_epilogues(torch.float32), reason="needs oneDNN")
@pytest.mark.parametrize("backend", [testing.post_grad_backend(), "inductor"])
def test_metadata_of_what_depends_on_a_folded_layer(backend):
    """oneDNN's result is channels-last, and so is what is computed from it and added to another's.

    With metadata that says otherwise, Inductor of torch 2.15 raises. The first layer's result is
    used as it is, as a view and by an operator with two results.
    """
    seen = []

    def check(graph):
        for node in graph.nodes:
            value = node.meta.get("val")
            inputs = [n.meta.get("val") for n in node.all_input_nodes]
            if node.op == "call_function" and isinstance(value, Tensor) and None not in inputs:
                args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                with value.fake_mode:
                    again = node.target(*args, **kwargs)
                assert (again.shape, again.stride()) == (value.shape, value.stride()), node
                seen.append(value.stride())

    torch.manual_seed(0)
    x, v, w, s = (torch.randn(n) for n in ((2, 3, 8, 8), (4, 3, 1, 1), (4, 4, 1, 1), (4, 1, 1)))

    def fn(x: Tensor, v: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        y = (F.conv2d(x, v) * s).relu()
        z = F.conv2d(y, w) * s + y.sin()
        return z.relu(), y.transpose(2, 3).cos(), F.max_pool2d(y, 2, return_indices=True)[0].exp()

    checked = hook.passes_added("post_grad_custom_pre_pass", check)
    with testing.fresh_compile(), cbn.options(forward="fold"), checked, torch.no_grad():
        out = torch.compile(fn, backend=backend)(x, v, w, s)
    torch.testing.assert_close(out, fn(x, v, w, s))
    assert sum(stride == (256, 1, 32, 4) for stride in seen) >= 5  # the layers' and what follows
