"""Gradients of trainable scales: what is recognised, that it is right, and what is kept."""

from __future__ import annotations

import collections
import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from common import LAYERS, channels, example_input
from torch import Tensor, nn
from torch._dynamo.utils import counters

import convbn_inductor_pass as cbn
from bench.libraries import MissingLibrary, require
from convbn_inductor_pass import ScaleCode, scales_rewrite, testing
from convbn_inductor_pass.saved import saved_for_backward


class Norm(nn.Module):
    """Batch norm in eval mode, written by hand, channels in dimension 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.rand(channels) + 0.5) for _ in range(2))
        self.register_buffer("mean", torch.randn(channels))
        self.register_buffer("var", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        ones = [1] * (x.ndim - 2)
        gamma, beta, mean, var = (
            t.view(-1, *ones) for t in (self.gamma, self.beta, self.mean, self.var)
        )
        return (x - mean) / torch.sqrt(var + 1e-5) * gamma + beta


class Scale(nn.Module):
    """Multiplication with one trained number per channel, in one of several spellings."""

    def __init__(self, channels: int, form: str = "index") -> None:
        super().__init__()
        self.gamma, self.form = nn.Parameter(torch.rand(channels) + 0.5), form
        self.other = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        ones = [1] * (x.ndim - 2)
        v = self.gamma.view(-1, *ones)
        if self.form == "index":
            return x * self.gamma[(slice(None), *[None] * (x.ndim - 2))]
        if self.form == "left":
            return v * x
        if self.form == "expanded":
            return x * v.expand(x.shape)
        if self.form == "divide":
            return x / (v + 1)
        if self.form == "addcmul":
            return torch.addcmul(self.other.view(-1, *ones), x, v, value=0.5)
        if self.form == "last":
            return (x.movedim(1, -1) * self.gamma).movedim(-1, 1)
        if self.form == "two":
            return -(x * v + 1) * self.other.view(-1, *ones) - 2
        if self.form == "number":
            return x * self.gamma[:1].exp()
        if self.form == "in place":
            return x.clone().mul_(v)
        raise ValueError(self.form)


FORMS = ("index", "left", "expanded", "divide", "addcmul", "last", "two", "number", "in place")


class Residual(nn.Module):
    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def step(fn, inputs, parameters, *, flag, dynamic=None, autocast=False, backend=None):
    """Outputs, gradients, and records of a compiled call with or without the pass."""
    cbn.clear_records()
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with testing.fresh_compile(flag=flag), context:
        backend = backend or testing.post_grad_backend()
        compiled = torch.compile(fn, backend=backend, dynamic=dynamic)
        outputs, gradients = testing.outputs_and_gradients(compiled, parameters, inputs)
    return outputs, gradients, cbn.scale_records()


def error(value, exact):
    if not exact.numel():
        return 0.0
    return ((value.double() - exact).abs().max() / (exact.abs().max() + 1e-30)).item()


def codes_of(model, *inputs, factor=4.0, **options):
    """Codes of the decisions about ``model``, whose results are checked on the way.

    Outputs have the bits that they have without the pass, and the error of each gradient against
    float64 is at most ``factor`` times the largest without it.
    """
    parameters = dict(model.named_parameters())
    inputs = tuple(i.detach().clone().requires_grad_(i.requires_grad) for i in inputs)
    counters.clear()
    out, grads, records = step(model, inputs, parameters, flag=True, **options)
    codes = [r.code for r in records]
    rewritten = counters["inductor"]["efficient_conv_bn_eval_scales"]
    assert rewritten == sum(c.rewritten for c in codes)
    plain_out, plain_grads, none = step(model, inputs, parameters, flag=False, **options)
    assert not none
    for a, b in zip(out, plain_out, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    reference = copy.deepcopy(model).double()
    doubles = [i.detach().double().requires_grad_(i.requires_grad) for i in inputs]
    _, exact = testing.outputs_and_gradients(
        reference, dict(reference.named_parameters()), tuple(doubles)
    )
    assert grads.keys() == plain_grads.keys() == exact.keys()
    largest = max(error(plain_grads[n], exact[n]) for n in exact)
    narrow = options.get("autocast") or any(t.dtype == torch.bfloat16 for t in inputs)
    eps = torch.finfo(torch.bfloat16 if narrow else inputs[0].dtype).eps
    for name, value in exact.items():
        assert grads[name].dtype == plain_grads[name].dtype
        assert error(grads[name], value) <= factor * largest + 8 * eps, name
    return codes


DTYPES = [torch.float32, torch.float64, torch.bfloat16]
DONE = ScaleCode.REWRITTEN


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, dtype):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    model = nn.Sequential(layer, Norm(channels(layer)), nn.ReLU()).to(dtype)
    x = example_input(layer, dtype=dtype, requires_grad=True)
    assert codes_of(model, x) == [DONE]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form, batch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), Scale(6, form), nn.ReLU())
    assert codes_of(model, torch.randn(batch, 4, 5, 5, requires_grad=True)) == [DONE]


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
        assert codes == [DONE]


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
    assert codes_of(Block(), x, dynamic=dynamic, autocast=autocast) == [DONE]


def test_zero_scale():
    torch.manual_seed(0)
    model = Residual(nn.Conv2d(4, 4, 3, padding=1), Scale(4))
    nn.init.zeros_(model.inner[1].gamma)
    assert codes_of(model, torch.randn(2, 4, 5, 5, requires_grad=True)) == [DONE]


def test_first_layer():
    """Whose input needs no gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), Norm(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3))
    assert codes_of(model, torch.randn(2, 4, 5, 5)) == [DONE]


def test_layer_used_twice():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(4, 4, 3, padding=1), Norm(4)
    model = nn.Sequential(conv, norm, nn.ReLU(), conv, norm)
    assert codes_of(model, torch.randn(2, 4, 5, 5, requires_grad=True)) == [DONE, DONE]


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
    assert codes == [ScaleCode.NEEDED_ANYWAY] * 2 or codes == [DONE, ScaleCode.NEEDED_ANYWAY]


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
    assert codes_of(model, x) == [DONE if gains else ScaleCode.NEEDED_ANYWAY]


LEFT = {
    "output used elsewhere": (lambda y, x, v, w: y * v + y.mean(), ScaleCode.OTHER_GRADIENT),
    "two chains": (lambda y, x, v, w: (y * v).relu() + y * w, ScaleCode.OTHER_GRADIENT),
    "transposed": (lambda y, x, v, w: (y.mT * v) @ y, ScaleCode.OTHER_GRADIENT),
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
    assert codes_of(model, x) == [ScaleCode.OTHER_GRADIENT]


def test_batch_of_one_with_a_scale_from_activations():
    """There it is one number per channel, and the same is right."""
    torch.manual_seed(0)
    model = Fn(lambda y, x, v, w: y * (x.mean((2, 3), keepdim=True) * v))
    codes_of(model, torch.randn(1, 4, 4, 4, requires_grad=True))


def test_frozen_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), Norm(6), nn.ReLU())
    model[0].requires_grad_(False)
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    assert codes_of(model, x) == [ScaleCode.LAYER_FROZEN]
    with cbn.options(fuse_frozen_layers=True):
        assert codes_of(model, x) == [DONE]


def test_options():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), Norm(6), nn.ReLU())
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    for changes, code in (
        ({"deny": ("0",)}, ScaleCode.DENIED),
        ({"deny": ("1",)}, ScaleCode.DENIED),
        ({"allow": ("2",)}, ScaleCode.DENIED),
        ({"allow": ("1",)}, DONE),
        ({"objective": "speed"}, ScaleCode.LARGE_WEIGHT),
    ):
        with cbn.options(**changes):
            assert codes_of(model, x) == [code]


def test_a_batch_norm_that_is_denied_is_not_taken_for_another_scale():
    """The sum for its weight's gradient is over what backward computes anew, for that module."""
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()).eval()
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    with cbn.options(deny=("1",)):
        assert codes_of(model, x) == [ScaleCode.DENIED]


def test_float16_is_left_alone():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), Norm(6), nn.ReLU()).half()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float16, requires_grad=True)
    *_, records = step(model, (x,), dict(model.named_parameters()), flag=True)
    assert [r.code for r in records] == [ScaleCode.FLOAT16_RANGE]


def test_mixed_dtypes_are_left_alone():
    model = Fn(lambda y, x, v, w: y.double() * v.double())
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    assert codes_of(model, x) == [ScaleCode.UNSUPPORTED_DTYPE]


def test_batch_norms_own_pass_comes_first():
    """What the pre-grad pass has fused keeps nothing that could be summed over."""
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()).eval()
    assert codes_of(model, torch.randn(2, 4, 5, 5, requires_grad=True)) == []


def without_gradients_of(model, *names):
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if name.endswith(names):
            parameter.requires_grad_(False)
    return model


def test_symbolic_sizes_are_not_guarded_on():
    """Of as many rows as channels there is nothing special."""
    torch.manual_seed(0)
    linear, gamma = nn.Linear(4, 4), nn.Parameter(torch.randn(4))

    def fn(x):
        y = linear(x) * gamma
        return (y @ y.T.sin()).sum()

    counters.clear()
    with testing.fresh_compile():
        compiled = torch.compile(fn, backend=testing.post_grad_backend(), dynamic=True)
        for rows in (6, 4, 5):
            compiled(torch.randn(rows, 4)).backward()
    assert counters["inductor"]["efficient_conv_bn_eval_scales"] == 1
    assert counters["stats"]["unique_graphs"] == 1
    cbn.clear_records()


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
    assert set(codes) == {DONE}  # one: torch 2.11 breaks the graph at the convolution


@pytest.mark.parametrize("dynamic", [None, True])
def test_kept_as_without_gradients_of_the_scales(dynamic):
    model = nn.Sequential(
        *(Residual(nn.Conv2d(4, 4, 3, padding=1), Norm(4), nn.ReLU()) for _ in range(3)),
        *(Residual(nn.Conv2d(4, 4, 1), nn.GELU(), nn.Conv2d(4, 4, 1), Scale(4)) for _ in range(2)),
    )
    x = torch.randn(2, 4, 8, 8)
    kept = {
        mode: saved_for_backward(model, x, mode=mode, dynamic=dynamic) for mode in ("eval", "tune")
    }
    frozen = without_gradients_of(model, "gamma")
    least = saved_for_backward(frozen, x, mode="eval", dynamic=dynamic)
    size = x.numel() * 4
    # Five outputs less; in the place of three of them, ReLU's masks.
    less = 5 * size - 3 * x.numel()
    assert kept["tune"].new_bytes == least.new_bytes == kept["eval"].new_bytes - less
    assert kept["tune"].bytes_of("weight") == 0


MODELS = {
    "torchvision": ("torchvision.models", lambda m: m.convnext_tiny(), 18, (2, 3, 64, 64)),
    "timm, convolutions": (
        "timm",
        lambda m: m.create_model("convnext_atto", drop_path_rate=0.0),
        12,
        (2, 3, 64, 64),
    ),
    "timm, linear layers": (
        "timm",
        lambda m: m.create_model("deit3_small_patch16_224", img_size=32, depth=3),
        6,
        (2, 3, 32, 32),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_real_models(name):
    library, make, count, shape = MODELS[name]
    try:
        library = require(library)
    except MissingLibrary as missing:
        pytest.skip(str(missing))
    torch.manual_seed(0)
    model, x = make(library).eval(), torch.randn(shape)
    explanation = cbn.explain(model, x)
    assert [r.code for r in explanation.scales] == [DONE] * count
    frozen = without_gradients_of(model, "gamma", "layer_scale")
    least = saved_for_backward(frozen, x, mode="eval").new_bytes
    assert explanation.saved_bytes["tune"] == least < explanation.saved_bytes["eval"]
    assert f"{count} of {count} layers" in str(explanation)
    if "linear" in name:
        assert codes_of(model, x) == [DONE] * count


def test_through_inductor():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3), Norm(4), nn.ReLU(), Residual(nn.Conv2d(4, 4, 1), Scale(4)),
        nn.Flatten(), nn.Linear(64, 8), Scale(8),
    )  # fmt: skip
    x = torch.randn(3, 4, 6, 6, requires_grad=True)
    assert codes_of(model, x, backend="inductor") == [DONE] * 3


@pytest.mark.parametrize("method", ["_inner_product", "_replace"])
def test_a_failure_half_way_leaves_a_right_graph(method, monkeypatch):
    """What was replaced until then may use what stands later in the graph."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), Scale(6), nn.ReLU(), nn.Linear(6, 4), Scale(4))
    x, parameters = torch.randn(5, 4, requires_grad=True), dict(model.named_parameters())
    _, expected = testing.outputs_and_gradients(model, parameters, (x,))
    calls, whole = [], getattr(scales_rewrite._Rewriting, method)

    def fails_midway(*args):
        calls.append(args)
        if len(calls) == (2 if method == "_inner_product" else 3):
            raise RuntimeError("on purpose")
        return whole(*args)

    monkeypatch.setattr(scales_rewrite._Rewriting, method, fails_midway)
    with pytest.warns(cbn.PassFailedWarning, match="on purpose"):
        _, gradients, _ = step(model, (x,), parameters, flag=True)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4)


def test_refused_graphs_stay_as_they_are():
    """Nothing is added, moved or erased where nothing is rewritten."""
    from convbn_inductor_pass import hook

    graphs = collections.defaultdict(list)

    def record(name):
        return lambda graph: graphs[name].append(str(graph))

    ours = hook._HOOKS["joint_custom_pre_pass"]
    model = nn.Sequential(nn.Conv2d(4, 6, 3), Norm(6), nn.SiLU())
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    with testing.fresh_compile():
        passes = record("before"), ours, record("after")
        before = torch._inductor.config.joint_custom_pre_pass
        hook._set_passes("joint_custom_pre_pass", passes)
        try:
            torch.compile(model, backend=testing.post_grad_backend())(x)
        finally:
            torch._inductor.config.joint_custom_pre_pass = before
    assert graphs["before"] == graphs["after"] != []
    cbn.clear_records()
