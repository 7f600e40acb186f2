"""Layer and eval-mode batch norm as one function, against the two written one after the other."""

import concurrent.futures
import copy
import functools
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from common import LAYERS, ConvBN, channels, example_input
from torch import nn

from convbn_inductor_pass.functional.conv_bn import batch_norm, layer
from convbn_inductor_pass.graph.layout import Layout, scale_weight


def call(module, x, weight, bias):
    parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return torch.func.functional_call(module, parameters, x)


def fused(model, x, weight, bias, gamma, beta, *, watched=False):
    bn = model.bn
    c, before = layer(lambda: call(model.layer, x, weight, bias), x, weight, bias)
    # Of a linear layer, as rows.
    c = c.flatten(0, -2) if isinstance(model.layer, nn.Linear) else c
    assert before.gave(c)
    statistics = bn.running_mean, bn.running_var
    return batch_norm(c, before, *statistics, gamma, beta, bn.eps, lambda: (watched, []))


def plain(model, x, weight, bias, gamma, beta):
    c, bn = call(model.layer, x, weight, bias), model.bn
    return F.batch_norm(c, bn.running_mean, bn.running_var, gamma, beta, False, 0.1, bn.eps)


def leaves(model, dtype=torch.float64):
    layer, bn = model.layer, model.bn
    sources = (example_input(layer), layer.weight, layer.bias, bn.weight, bn.bias)
    return [None if t is None else t.detach().to(dtype).requires_grad_() for t in sources]


def gradients(call, model, tensors, dy=None):
    y = call(model, *tensors)
    return torch.autograd.grad(
        y, [t for t in tensors if t is not None], torch.ones_like(y) if dy is None else dy
    )


@pytest.fixture(params=LAYERS, name="model")
def _model(request):
    torch.manual_seed(0)
    return ConvBN(LAYERS[request.param]()).double()


@pytest.mark.parametrize("gamma", ["spread", "zero", "one_zero", "tiny"])
def test_output_and_gradients(model, gamma):
    """A division by gamma somewhere would give NaN or inf where it is zero."""
    tensors = leaves(model)
    if gamma == "zero":
        with torch.no_grad():
            tensors[3].zero_()
    elif gamma == "one_zero":
        with torch.no_grad():
            tensors[3][1] = 0
    elif gamma == "tiny":
        with torch.no_grad():
            tensors[3].mul_(1e-200)
    y = plain(model, *tensors)
    assert torch.equal(fused(model, *tensors), y)
    assert fused(model, *tensors).stride() == y.stride()
    dy = torch.randn_like(y)
    expected = gradients(plain, model, tensors, dy)
    for watched in (False, True):
        got = gradients(functools.partial(fused, watched=watched), model, tensors, dy)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_gradcheck_and_gradgradcheck(model):
    tensors = leaves(model)
    present = [t for t in tensors if t is not None]

    def function(*given):
        given = iter(given)
        return fused(model, *[None if t is None else next(given) for t in tensors])

    assert torch.autograd.gradcheck(function, present, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, present, fast_mode=True)


# gamma with x, with weight, with bias, with x and weight
@pytest.mark.parametrize("needed", [{0, 3}, {1, 3}, {2, 3}, {0, 1, 3}])
def test_computes_only_what_is_needed(needed):
    """Gradients are eval mode's, and no convolution runs in vain."""
    torch.manual_seed(0)
    model = ConvBN(nn.Conv2d(4, 6, 3)).double()
    tensors = [t.detach() for t in leaves(model)]
    wanted = [tensors[i].requires_grad_() for i in needed]
    with torch.profiler.profile() as profile:
        got = torch.autograd.grad(fused(model, *tensors).square().sum(), wanted)
    expected = torch.autograd.grad(plain(model, *tensors).square().sum(), wanted)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    calls = [e for e in profile.events() if e.name == "aten::convolution_backward"]
    assert len(calls) == 1


def test_layer_s_node_is_left_with_nothing_to_compute():
    """Unless someone looks at the gradient of its output, through its node or by a handle."""
    torch.manual_seed(0)
    model = ConvBN(nn.Conv2d(4, 6, 3))
    tensors = leaves(model, torch.float32)
    for watched in (False, True):
        c, before = layer(lambda: model.layer(tensors[0]), *tensors[:3])
        assert c.grad_fn is before.node
        given = []
        c.grad_fn.register_prehook(given.extend)
        of_norm = model.bn.running_mean, model.bn.running_var, *tensors[3:], model.bn.eps
        y = batch_norm(c, before, *of_norm, lambda watched=watched: (watched, []))
        y.sum().backward()
        assert [g is not None for g in given] == [watched]


def test_saves_no_activation_but_its_input(model):
    tensors = leaves(model)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused(model, *tensors)
    x = tensors[0]
    activations = [t for t in saved if t.shape[0] == x.shape[0] and t.ndim == x.ndim]
    assert len(activations) == 1
    given = {t.data_ptr() for t in [*tensors, *model.bn.buffers()] if t is not None}
    if getattr(model.layer, "padding", None) == "same":  # of an even kernel: saves what it pads
        given.add(activations[0].data_ptr())
    assert {t.data_ptr() for t in saved} <= given


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("name", ["conv2d", "linear"])
def test_others_hooks_pack_and_unpack_once(name, watched):
    """Two nodes read the layer's input: checkpointing refuses, offloading would copy twice."""
    torch.manual_seed(0)
    model = ConvBN(LAYERS[name]()).double()
    tensors = leaves(model)
    wanted = [t for t in tensors if t is not None]
    packed, unpacked = [], []

    def unpack(slot):
        copy = packed[slot].clone()
        unpacked.append((slot, weakref.ref(copy)))
        return copy

    def backward(wanted):
        unpacked.clear()
        gradients = torch.autograd.grad(y.square().sum(), wanted, retain_graph=True)
        assert [slot for slot, _ in unpacked].count(of_x) == 1
        assert not any(alive() is not None for _, alive in unpacked)
        return gradients

    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: packed.append(t.detach()) or len(packed) - 1, unpack
    )
    with hooks:
        y = fused(model, *tensors, watched=watched)
    (of_x,) = (i for i, t in enumerate(packed) if t.data_ptr() == tensors[0].data_ptr())
    assert len({t.data_ptr() for t in packed}) == len(packed)
    expected = torch.autograd.grad(plain(model, *tensors).square().sum(), wanted)
    for _ in range(2):
        torch.testing.assert_close(backward(wanted), expected, rtol=1e-10, atol=1e-10)
    backward([tensors[3]])  # of gamma, in which the layer's node does not run
    torch.testing.assert_close(backward(wanted), expected, rtol=1e-10, atol=1e-10)


def test_two_threads_in_one_graph_under_others_hooks():
    """As checkpointing's, that are asked once in each backward pass."""
    torch.manual_seed(0)
    model = ConvBN(LAYERS["conv2d"]()).double()
    tensors = leaves(model)
    both, unpacked = threading.Barrier(2), set()

    def unpack(t):
        key = torch._C._current_graph_task_id(), t.data_ptr()
        assert key not in unpacked
        unpacked.add(key)
        if t.data_ptr() == tensors[0].data_ptr():
            both.wait(timeout=60)
        return t

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        y = fused(model, *tensors)
    wanted = [t for t in tensors if t is not None]
    expected = gradients(plain, model, tensors)

    def backward():
        return torch.autograd.grad(y, wanted, torch.ones_like(y), retain_graph=True)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for result in [pool.submit(backward) for _ in range(2)]:
            torch.testing.assert_close(result.result(), expected, rtol=1e-10, atol=1e-10)


def test_bias_without_versions():
    model = ConvBN(LAYERS["conv2d"]())
    x, weight, *_ = leaves(model, torch.float32)
    with torch.inference_mode():
        bias = torch.ones(channels(model.layer))
    c, before = layer(lambda: call(model.layer, x, weight, bias), x, weight, bias)
    assert c.requires_grad
    assert before is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d_grouped", "linear"])
def test_half_precision(name, dtype):
    """Wider parameters get gradients in their dtype, as accurate as eval mode's under autocast."""
    torch.manual_seed(0)
    model = ConvBN(LAYERS[name]())
    tensors = leaves(model, torch.float32)
    with torch.autocast("cpu", dtype):
        y, by_eval = fused(model, *tensors), plain(model, *tensors)
    assert y.dtype == by_eval.dtype == dtype
    dy = torch.randn_like(by_eval)
    wanted = [t for t in tensors if t is not None]
    tune = torch.autograd.grad(y, wanted, dy)
    other = torch.autograd.grad(by_eval, wanted, dy)
    doubles = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    exact = gradients(plain, copy.deepcopy(model).double(), doubles, dy.double())
    for a, b, r in zip(tune, other, exact, strict=True):
        assert a.dtype == b.dtype == torch.float32
        error, eval_error = ((t.double() - r).abs().max() / r.abs().max() for t in (a, b))
        assert error <= 2 * eval_error + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["conv2d", "linear"])
def test_autocast_around_it_changes_nothing(name, dtype):
    """In a backward that is called under it."""
    torch.manual_seed(0)
    model = ConvBN(LAYERS[name]())
    tensors = leaves(model, torch.float32)
    expected = gradients(fused, model, tensors)
    y, wanted = fused(model, *tensors), [t for t in tensors if t is not None]
    with torch.autocast("cpu", dtype):
        got = torch.autograd.grad(y, wanted, torch.ones_like(y))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d", "conv_transpose2d_grouped"])
def test_scaled_weight_has_the_memory_format_of_the_weight(name, fmt):
    layer = LAYERS[name]().to(memory_format=fmt)
    layout = Layout(layer.transposed, layer.groups)
    scale = torch.rand(channels(layer)) + 0.5
    scaled = scale_weight(layer.weight, scale, layout)
    assert scaled.stride() == layer.weight.stride()
    # What the scale is for: it commutes with the layer.
    x = example_input(layer)
    parameters = {"weight": scaled}
    if layer.bias is not None:
        parameters["bias"] = layer.bias * scale
    by_weight = torch.func.functional_call(layer, parameters, x)
    torch.testing.assert_close(by_weight, layer(x) * scale.view(1, -1, 1, 1))


def test_linear_layer_of_more_dimensions():
    torch.manual_seed(0)
    model = ConvBN(nn.Linear(4, 6)).double()
    _, weight, bias, gamma, beta = leaves(model)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    tune = fused(model, x, weight, bias, gamma, beta)
    by_eval = model.bn(F.linear(x, weight, bias).flatten(0, 2))
    torch.testing.assert_close(tune, by_eval)
    (got,) = torch.autograd.grad(tune.square().sum(), x)
    (expected,) = torch.autograd.grad(by_eval.square().sum(), x)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d", "linear"])
def test_empty_batch(name, dtype):
    model = ConvBN(LAYERS[name]()).to(dtype)
    _, *rest = leaves(model, dtype)
    tensors = [example_input(model.layer, batch=0, dtype=dtype, requires_grad=True), *rest]
    assert fused(model, *tensors).shape == plain(model, *tensors).shape
    wanted = [t for t in tensors if t is not None]
    for t, g in zip(wanted, gradients(fused, model, tensors), strict=True):
        assert g.shape == t.shape
        assert not g.any()
