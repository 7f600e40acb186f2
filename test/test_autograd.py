"""The gradient formula, without FX: against eval mode's, numerically, and twice."""

import copy

import pytest
import torch
import torch.nn.functional as F
from common import LAYERS, ConvBN, channels, example_input
from torch import nn

from convbn_inductor_pass import fold
from convbn_inductor_pass.autograd import conv_bn_eval, linear_bn_eval


def fused_call(model: ConvBN, x, weight, bias, gamma, beta):
    layer, bn = model.layer, model.bn
    tensors = (x, weight, bias, gamma, beta, bn.running_mean, bn.running_var, bn.eps)
    if isinstance(layer, nn.Linear):
        return linear_bn_eval(*tensors)
    return conv_bn_eval(
        *tensors,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.transposed,
        layer.output_padding,
        layer.groups,
    )


def plain_call(model: ConvBN, x, weight, bias, gamma, beta):
    parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    c = torch.func.functional_call(model.layer, parameters, x)
    bn = model.bn
    return F.batch_norm(c, bn.running_mean, bn.running_var, gamma, beta, False, 0.1, bn.eps)


def leaves(model: ConvBN, dtype=torch.float64):
    layer, bn = model.layer, model.bn
    sources = (example_input(layer), layer.weight, layer.bias, bn.weight, bn.bias)
    return [None if t is None else t.detach().to(dtype).requires_grad_() for t in sources]


@pytest.fixture(params=LAYERS, name="model")
def _model(request):
    torch.manual_seed(0)
    return ConvBN(LAYERS[request.param]())


def test_same_bits_and_same_gradients(model):
    model.double()
    tensors = leaves(model)
    fused, plain = fused_call(model, *tensors), plain_call(model, *tensors)
    torch.testing.assert_close(fused, plain, rtol=0, atol=0)
    wanted = [t for t in tensors if t is not None]
    dy = torch.randn_like(plain)
    for a, b in zip(
        torch.autograd.grad(fused, wanted, dy),
        torch.autograd.grad(plain, wanted, dy),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_gradcheck_and_gradgradcheck(model):
    model.double()
    tensors = leaves(model)
    present = [t for t in tensors if t is not None]

    def call(*given):
        given = iter(given)
        return fused_call(model, *[None if t is None else next(given) for t in tensors])

    assert torch.autograd.gradcheck(call, present, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, present, fast_mode=True)


def test_zero_gamma_gives_its_gradient(model):
    # A division by gamma somewhere would give NaN or inf here.
    model.double()
    tensors = leaves(model)
    with torch.no_grad():
        tensors[3].zero_()
    wanted = [t for t in tensors if t is not None]
    fused = torch.autograd.grad(fused_call(model, *tensors).sum(), wanted)
    plain = torch.autograd.grad(plain_call(model, *tensors).sum(), wanted)
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("needed", range(5))
def test_computes_only_what_is_needed(needed):
    """One tensor requires grad: its gradient is eval mode's, and no convolution runs in vain."""
    torch.manual_seed(0)
    model = ConvBN(nn.Conv2d(4, 6, 3)).double()
    tensors = [t.detach() for t in leaves(model)]
    tensors[needed].requires_grad_()
    with torch.profiler.profile() as profile:
        (got,) = torch.autograd.grad(fused_call(model, *tensors).square().sum(), tensors[needed])
    (expected,) = torch.autograd.grad(plain_call(model, *tensors).square().sum(), tensors[needed])
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    calls = [e for e in profile.events() if e.name == "aten::convolution_backward"]
    assert len(calls) == (1 if needed in (0, 1, 3) else 0)  # x, weight, gamma


def test_saves_no_activation_but_its_input(model):
    tensors = leaves(model, torch.float32)
    model.float()
    saved = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = fused_call(model, *tensors)
    x = tensors[0]
    activations = [t for t in saved if t.shape[0] == x.shape[0] and t.ndim == x.ndim]
    if getattr(model.layer, "padding", None) == "same":
        # An even kernel pads its input first, as eval mode does, and keeps the padded one.
        assert len(activations) == 1
    else:
        assert [t.data_ptr() for t in activations] == [x.data_ptr()]
    assert not any(t.shape == y.shape for t in saved if t.data_ptr() != x.data_ptr())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d_grouped", "linear"])
def test_autocast_gives_eval_modes_dtypes(name, dtype):
    torch.manual_seed(0)
    model = ConvBN(LAYERS[name]())
    tensors = leaves(model, torch.float32)
    with torch.autocast("cpu", dtype):
        fused, plain = fused_call(model, *tensors), plain_call(model, *tensors)
    assert fused.dtype == plain.dtype == dtype
    torch.testing.assert_close(fused, plain, rtol=0, atol=0)
    exact = copy.deepcopy(model).double()
    doubles = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    dy = torch.randn_like(plain)
    wanted = [t for t in tensors if t is not None]
    by_fused = torch.autograd.grad(fused, wanted, dy)
    by_plain = torch.autograd.grad(plain, wanted, dy)
    reference = torch.autograd.grad(
        plain_call(exact, *doubles), [t for t in doubles if t is not None], dy.double()
    )
    eps = torch.finfo(dtype).eps
    for a, b, r in zip(by_fused, by_plain, reference, strict=True):
        assert a.dtype == b.dtype == torch.float32
        scale = r.abs().max()
        error, eval_error = ((t.double() - r).abs().max() / scale for t in (a, b))
        assert error <= 2 * eval_error + eps


def test_under_functorch(model):
    model.double()
    x, weight, bias, gamma, beta = leaves(model)
    batch = torch.stack([x.detach(), 2 * x.detach()])
    with torch.no_grad():
        mapped = torch.vmap(lambda v: fused_call(model, v, weight, bias, gamma, beta))(batch)
        looped = torch.stack([fused_call(model, v, weight, bias, gamma, beta) for v in batch])
    torch.testing.assert_close(mapped, looped)

    def loss(call):
        return lambda g: call(model, x, weight, bias, g, beta).square().sum()

    per_sample = torch.vmap(torch.func.grad(loss(fused_call)))(torch.stack([gamma, 2 * gamma]))
    expected = torch.stack([torch.func.grad(loss(plain_call))(g) for g in (gamma, 2 * gamma)])
    torch.testing.assert_close(per_sample, expected)


@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d", "conv_transpose2d_grouped"])
def test_scaled_weight_keeps_memory_format(name, fmt):
    layer = LAYERS[name]().to(memory_format=fmt)
    layout = fold.Layout(layer.transposed, layer.groups)
    scale = torch.rand(channels(layer)) + 0.5
    scaled = fold.scale_weight(layer.weight, scale, layout)
    assert scaled.stride() == layer.weight.stride()
    # What the scale is for: it commutes with the layer.
    x = example_input(layer)
    by_weight = torch.func.functional_call(
        layer, {"weight": scaled, **({} if layer.bias is None else {"bias": layer.bias * scale})}, x
    )
    torch.testing.assert_close(by_weight, layer(x) * scale.view(1, -1, 1, 1))


def test_linear_keeps_rows_of_more_dimensions():
    torch.manual_seed(0)
    model = ConvBN(nn.Linear(4, 6)).double()
    _, weight, bias, gamma, beta = leaves(model)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    fused = fused_call(model, x, weight, bias, gamma, beta)
    plain = model.bn(F.linear(x, weight, bias).flatten(0, 2))
    torch.testing.assert_close(fused, plain)
    (got,) = torch.autograd.grad(fused.square().sum(), x)
    (expected,) = torch.autograd.grad(plain.square().sum(), x)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d", "linear"])
def test_empty_batch(name):
    model = ConvBN(LAYERS[name]())
    _, weight, bias, gamma, beta = leaves(model, torch.float32)
    x = example_input(model.layer, batch=0, requires_grad=True)
    y = fused_call(model, x, weight, bias, gamma, beta)
    assert y.shape == plain_call(model, x, weight, bias, gamma, beta).shape
    wanted = [t for t in (x, weight, bias, gamma, beta) if t is not None]
    for t, g in zip(wanted, torch.autograd.grad(y.sum(), wanted), strict=True):
        assert g.shape == t.shape
        assert not g.any()


@pytest.mark.parametrize("name", ["conv2d", "linear"])
def test_mixed_dtypes_without_autocast_raise_as_the_layer_does(name):
    model = ConvBN(LAYERS[name]())
    x, weight, bias, gamma, beta = leaves(model, torch.float32)
    with pytest.raises(RuntimeError, match=r"dtype|type"):
        plain_call(model, x.to(torch.bfloat16), weight, bias, gamma, beta)
    with pytest.raises(RuntimeError, match="to have the same dtype"):
        fused_call(model, x.to(torch.bfloat16), weight, bias, gamma, beta)
