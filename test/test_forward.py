"""The kernel half: what is recognised and folded, that it is right, and that nothing goes stale."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from common import Residual, spread_statistics
from torch import Tensor, nn
from torch._dynamo.utils import counters

import convbn_inductor_pass as cbn
from convbn_inductor_pass import ForwardCode, testing


class Frozen(nn.Module):
    """Frozen batch norm, written out in one of several ways."""

    def __init__(self, channels: int, form: str) -> None:
        super().__init__()
        self.form = form
        for i, name in enumerate(("weight", "bias", "mean", "var")):
            generator = torch.Generator().manual_seed(i)
            value = torch.rand(channels, generator=generator) + 0.5
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        w, b, m, v = self.weight, self.bias, self.mean, self.var
        if self.form == "functional":
            return F.batch_norm(x, m, v, w, b, training=False)
        if self.form == "torchvision":
            w, b, v, m = (t.reshape(1, -1, 1, 1) for t in (w, b, v, m))
            scale = w * (v + 1e-5).rsqrt()
            return x * scale + (b - m * scale)
        if self.form == "written":
            x = (x - m[None, :, None, None]) / torch.sqrt(v[None, :, None, None] + 1e-5)
            return x * w[None, :, None, None] + b[None, :, None, None]
        if self.form == "reversed":
            return b[:, None, None] - w.view(-1, 1, 1) * (m.view(1, -1, 1, 1) - x) * v.view(
                -1, 1, 1
            )
        if self.form == "addcmul":
            return torch.addcmul(b[:, None, None], x, w[:, None, None], value=0.5)
        if self.form == "expanded":
            return x * w[None, :, None, None].expand_as(x) + b[:, None, None].expand(x.shape[1:])
        if self.form == "numbers":
            return 3 - (-(x * 2 + 1)) / 4
        if self.form == "several":
            y = F.batch_norm(x, m, v, w, b) * w[:, None, None]
            return F.batch_norm(y, v, m) + b[:, None, None]
        raise ValueError(self.form)


FORMS = (
    "functional", "torchvision", "written", "reversed", "addcmul", "expanded", "numbers", "several"
)  # fmt: skip


def folded(fn, *inputs, forward="fold", grad=False):
    """Outputs with the kernel half, and its records."""
    cbn.clear_records()
    with testing.fresh_compile(), cbn.options(forward=forward):
        compiled = torch.compile(fn, backend=testing.post_grad_backend())
        with torch.set_grad_enabled(grad):
            out = compiled(*inputs)
    return out, cbn.forward_records()


def assert_folded_right(model, *inputs, count, forward="fold"):
    """``count`` layers are folded, and the error against float64 is at most twice eval mode's."""
    with torch.no_grad():
        out, records = folded(model, *inputs, forward=forward)
        expected = model(*inputs)
        exact = copy.deepcopy(model).double()(*(i.double() for i in inputs))
    assert sum(r.code.folded for r in records) == count, records
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    scale = exact.abs().max()
    error, by_eval = ((o.double() - exact).abs().max() / scale for o in (out, expected))
    assert error <= 2 * by_eval + 4 * torch.finfo(out.dtype).eps
    return records


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Frozen(8, form), nn.ReLU()).to(dtype)
    x = torch.randn(2, 3, 6, 6, dtype=dtype)
    (record,) = assert_folded_right(model, x, count=1)
    assert record.epilogue == ("" if dtype == torch.float64 else "relu")


LAYERS = [
    (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 8)),
    (nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (2, 4, 8, 8)),
    (nn.Conv3d(4, 6, 2, dilation=2), nn.BatchNorm3d(6, affine=False), (2, 4, 5, 5, 5)),
    (nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (2, 4, 8)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    (nn.ConvTranspose2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4), (2, 4, 5, 5)),
    (nn.ConvTranspose3d(4, 6, 2), nn.BatchNorm3d(6), (1, 4, 3, 3, 3)),
    (nn.Linear(5, 6), nn.BatchNorm1d(6), (7, 5)),
    (nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), (7, 5)),
]


@pytest.mark.parametrize(("layer", "bn", "shape"), LAYERS, ids=lambda v: type(v).__name__)
def test_layers(layer, bn, shape):
    torch.manual_seed(0)
    model = nn.Sequential(layer, bn)
    spread_statistics(model)
    assert_folded_right(model.eval(), torch.randn(shape), count=1)


ACTIVATIONS = {
    "relu": nn.ReLU(),
    "hardtanh": nn.ReLU6(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "swish": nn.SiLU(),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "leaky_relu": nn.LeakyReLU(0.1),
    "gelu": nn.GELU(),
    "gelu ": nn.GELU("tanh"),
}


@pytest.mark.parametrize("bn", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, dtype, bn):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8) if bn else nn.Identity()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, ACTIVATIONS[name])
    spread_statistics(model)
    model = model.eval().to(dtype)
    (record,) = assert_folded_right(model, torch.randn(2, 3, 9, 9).to(dtype) * 3, count=1)
    assert record.epilogue == name.strip()


def test_not_an_activation():
    """Other numbers in an activation's form, and a value that something else uses too."""
    conv = nn.Conv2d(3, 8, 3)
    for fn in (
        lambda x: (y := conv(x)) * (y + 4).clamp(0, 6) / 6,
        lambda x: (y := conv(x)).relu() + y,
        lambda x: F.softplus(conv(x)),
    ):
        _, records = folded(fn, torch.randn(1, 3, 5, 5))
        assert not records


def test_residual_and_shared_inputs():
    torch.manual_seed(0)
    records = assert_folded_right(Residual().eval(), torch.randn(2, 3, 8, 8), count=Residual.pairs)
    assert any(r.epilogue.startswith("add") for r in records)


class SharedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        spread_statistics(self)

    def forward(self, x):
        return torch.cat([self.tower(x[..., :s, :s]).flatten() for s in (8, 4, 2)])


def test_a_shared_head_scales_its_weight_once():
    torch.manual_seed(0)
    graphs = []
    with testing.fresh_compile(), cbn.options(forward="fold"), torch.no_grad():
        backend = testing.post_grad_backend(on_graph=graphs.append)
        torch.compile(SharedHead().eval(), backend=backend)(torch.randn(1, 4, 8, 8))
    (graph,) = graphs
    scaled = [
        n for n in graph.nodes
        if n.target is torch.ops.aten.mul.Tensor and n.meta["val"].shape == (4, 4, 3, 3)
    ]  # fmt: skip
    assert len(scaled) == 1
    assert len(scaled[0].users) == 3


class BeforeViews(nn.Module):
    """LeViT's: batch norm over the rows of a linear layer's result."""

    def __init__(self):
        super().__init__()
        self.linear, self.bn = nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8)
        spread_statistics(self)

    def forward(self, x):
        y = self.linear(x)
        return self.bn(y.flatten(0, 1)).reshape_as(y)


def test_through_views():
    torch.manual_seed(0)
    assert_folded_right(BeforeViews().eval(), torch.randn(2, 5, 6), count=1)


def per_sample(x, w, s):
    return F.conv2d(x, w) * s


NOT_PER_CHANNEL = {
    "per sample": (2, 1, 1, 1),
    "per sample and channel": (2, 4, 1, 1),
    "per pixel": (1, 1, 4, 4),
    "per column": (4,),
}


@pytest.mark.parametrize("shape", NOT_PER_CHANNEL.values(), ids=NOT_PER_CHANNEL)
def test_not_per_channel(shape):
    torch.manual_seed(0)
    args = torch.randn(2, 3, 4, 4), torch.randn(4, 3, 1, 1), torch.randn(shape)
    out, records = folded(per_sample, *args)
    assert not records
    torch.testing.assert_close(out, per_sample(*args))


def squeeze_excite(x, w, v):
    y = F.conv2d(x, w)
    return F.conv2d(x, v) * y.mean((2, 3), keepdim=True)


@pytest.mark.parametrize("batch", [1, 2])
def test_scale_from_an_activation(batch):
    """With a batch of one, a scale per sample and channel is a scale per channel; still right."""
    torch.manual_seed(0)
    args = torch.randn(batch, 3, 4, 4), torch.randn(4, 3, 1, 1), torch.randn(4, 3, 1, 1)
    out, records = folded(squeeze_excite, *args)
    torch.testing.assert_close(out, squeeze_excite(*args))
    assert len(records) == (batch == 1)


def uses_itself(x, w):
    y = F.conv2d(x, w)
    return y * y.mean((2, 3), keepdim=True) + y


def test_scale_from_the_layer_itself():
    args = torch.randn(1, 3, 4, 4), torch.randn(4, 3, 1, 1)
    out, records = folded(uses_itself, *args)
    assert not records
    torch.testing.assert_close(out, uses_itself(*args))


def test_code_of_a_returned_view():
    torch.manual_seed(0)
    _, records = folded(Features().eval(), torch.randn(2, 3, 8, 8))
    codes = {r.layer: r.code for r in records}
    assert codes == {"conv": ForwardCode.VIEW_RETURNED, "down": ForwardCode.FOLDED}


def test_mixed_dtypes_are_left_alone():
    """A float32 layer whose affine map is in float64 keeps that precision."""
    args = torch.randn(1, 3, 4, 4), torch.randn(4, 3, 1, 1), torch.randn(4, 1, 1).double()
    out, (record,) = folded(per_sample, *args)
    assert record.code is ForwardCode.UNSUPPORTED_DTYPE
    torch.testing.assert_close(out, per_sample(*args), rtol=0, atol=0)


@torch.library.custom_op("convbn_test::bump", mutates_args={"x"})
def bump(x: Tensor) -> None:
    x.add_(1)


def writes_between(x, w, s):
    y = F.conv2d(x, w)
    bump(w)
    return y * s


def test_write_between_is_left_alone():
    """Moved past the write, the layer would read the new weight."""
    torch.manual_seed(0)
    x, w, s = torch.randn(1, 3, 4, 4), torch.randn(4, 3, 1, 1), torch.randn(4, 1, 1)
    expected = writes_between(x, w.clone(), s)
    out, (record,) = folded(writes_between, x, w.clone(), s)
    assert record.code is ForwardCode.WRITE_BETWEEN
    torch.testing.assert_close(out, expected)


def test_clamp_with_bounds_the_wrong_way_round():
    """Gives the upper bound as written; oneDNN refuses it."""
    x, w = torch.randn(1, 3, 4, 4), torch.randn(4, 3, 1, 1)
    fn = lambda x, w: (F.conv2d(x, w) * 2).clamp(3.0, 1.0)  # noqa: E731
    out, (record,) = folded(fn, x, w)
    assert record.epilogue == ""
    assert (out == 1).all()


def test_float16_is_left_alone():
    """A weight scaled by 1/sqrt(variance) may not fit."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)).eval().half()
    with torch.no_grad():
        model[1].running_var.fill_(0)
        model[1].weight.fill_(60000)
    x = torch.zeros(1, 3, 4, 4, dtype=torch.float16)
    out, (record,) = folded(model, x)
    assert record.code is ForwardCode.FLOAT16_RANGE
    assert out.isfinite().all()


def test_exact_is_the_default_and_changes_nothing():
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(2, 3, 8, 8)
    assert cbn.get_options().forward == "exact"
    out, records = folded(model, x, forward="exact")
    assert not records
    with testing.fresh_compile(flag=False), torch.no_grad():
        expected = torch.compile(model, backend=testing.post_grad_backend())(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_auto_weighs_bytes_where_it_must_not_measure():
    """Large activations: folded. Large weights: as written."""
    wide = nn.Sequential(nn.Conv2d(512, 512, 1), nn.BatchNorm2d(512), nn.ReLU()).eval()
    long = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()).eval()
    _, (kept,) = folded(wide, torch.randn(1, 512, 2, 2), forward="auto")
    _, (taken,) = folded(long, torch.randn(1, 8, 64, 64), forward="auto")
    assert kept.code is ForwardCode.SLOWER
    assert kept.bytes_folded > kept.bytes_exact == 2 * 512 * 4 * 4
    assert taken.code is ForwardCode.FOLDED
    assert taken.bytes_folded == 2 * 8 * 8 * 4


def test_weights_never_go_stale():
    """Optimizer steps, load_state_dict and edits in place show in the next call."""
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(2, 3, 8, 8)
    fresh = copy.deepcopy(model)
    with testing.fresh_compile(), cbn.options(forward="fold"), torch.no_grad():
        compiled = torch.compile(model, backend=testing.post_grad_backend())

        def check():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)

        check()
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        check()
        model.load_state_dict(fresh.state_dict())
        check()
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.mul_(2.0)
        before = compiled(x)
        check()
        model.load_state_dict(fresh.state_dict())
        assert not torch.equal(before, compiled(x))


def test_training_forward():
    """The forward of training is folded too; gradients are those of eval mode."""
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(4, 3, 8, 8)
    exact = copy.deepcopy(model).double()
    reference = testing.outputs_and_gradients(exact, dict(exact.named_parameters()), (x.double(),))
    with testing.fresh_compile(), cbn.options(forward="fold"):
        compiled = torch.compile(model, backend=testing.post_grad_backend())
        cbn.clear_records()
        got = testing.outputs_and_gradients(compiled, dict(model.named_parameters()), (x,))
    assert sum(r.code.folded for r in cbn.forward_records()) == Residual.pairs
    for name, gradient in reference[1].items():
        error = (got[1][name].double() - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-4, name


def test_dynamic_batch():
    torch.manual_seed(0)
    model = Residual().eval()
    with testing.fresh_compile(), cbn.options(forward="fold"), torch.no_grad():
        compiled = torch.compile(model, backend=testing.post_grad_backend(), dynamic=True)
        for batch in (3, 5, 2):
            x = torch.randn(batch, 3, 8, 8)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [8, 1])
def test_inductor_autocast(size):
    """bfloat16, with a residual after a grouped convolution, and on 1x1 maps: no raise."""
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(2, 3, size, size)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        outputs = {}
        for forward in ("exact", "fold"):
            cbn.clear_records()
            autocast = torch.autocast("cpu", torch.bfloat16)
            with testing.fresh_compile(), cbn.options(forward=forward), autocast:
                outputs[forward] = torch.compile(model)(x)
    assert sum(r.code.folded for r in cbn.forward_records()) == Residual.pairs
    assert outputs["fold"].dtype == outputs["exact"].dtype
    scale = exact.abs().max()
    errors = {k: (v.double() - exact).abs().max() / scale for k, v in outputs.items()}
    assert errors["fold"] <= 2 * errors["exact"] + 2 * torch.finfo(torch.bfloat16).eps


class Features(nn.Module):
    """Returns feature maps, one of them a view, as a detector's backbone does."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.down, self.down_bn = nn.Conv2d(8, 8, 3, 2), nn.BatchNorm2d(8)
        spread_statistics(self)

    def forward(self, x):
        y = self.bn(self.conv(x)).relu()
        return y, self.down_bn(self.down(y)), y[:, :, 1:]


@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last])
def test_strides_of_outputs(fmt):
    torch.manual_seed(0)
    model = Features().eval().to(memory_format=fmt)
    x = torch.randn(2, 3, 8, 8).to(memory_format=fmt)
    outputs = []
    for forward in ("exact", "fold"):
        with testing.fresh_compile(), cbn.options(forward=forward), torch.no_grad():
            outputs.append(torch.compile(model)(x))
    for exact, out in zip(*outputs, strict=True):
        assert out.stride() == exact.stride()
        torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)


def test_bias_and_weight_with_strides():
    """oneDNN reads memory as if it had no gaps or repeats."""
    torch.manual_seed(0)
    x, w, b = torch.randn(1, 3, 6, 6), torch.randn(3, 3, 3, 8).movedim(3, 0), torch.randn(8, 2)
    for bias in (b[:, 0], b[0, :1].expand(8)):
        fn = lambda x, w, bias: F.conv2d(x, w, bias).relu()  # noqa: E731
        for forward in ("fold", "auto"):
            out, (record,) = folded(fn, x, w, bias, forward=forward)
            assert record.code.folded
            torch.testing.assert_close(out, fn(x, w, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last])
def test_inductor(fmt):
    """Real code generation: numbers, strides, and that residual and ReLU are in the kernel."""
    torch.manual_seed(0)
    model = Residual().eval().to(memory_format=fmt)
    x = torch.randn(2, 3, 8, 8).to(memory_format=fmt)
    counters.clear()
    with torch.no_grad():
        with testing.fresh_compile():
            expected = torch.compile(model)(x)
        with testing.fresh_compile(), cbn.options(forward="fold"):
            out = torch.compile(model)(x)
    assert out.stride() == expected.stride()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert counters["inductor"]["efficient_conv_bn_eval_forward"] == Residual.pairs
    assert counters["inductor"]["mkldnn_conv_binary_unary_fusion_matcher_count"] >= 1


def test_random_chains():
    """Random sequences of affine steps and others: the same numbers, folded or not."""
    generator = torch.Generator().manual_seed(0)

    def draw(n):
        return int(torch.randint(n, (), generator=generator))

    shapes = [
        (1, 4, 1, 1),
        (4, 1, 1),
        (),
        (1,),
        (2, 4, 1, 1),
        (1, 1, 5, 5),
        (1, 4, 5, 5),
        (2, 4, 5, 5),
    ]
    steps = [
        lambda y, o: y * o,
        lambda y, o: o + y,
        lambda y, o: y - o,
        lambda y, o: o - y,
        lambda y, o: y / (o.abs() + 1),
        lambda y, o: -y,
        lambda y, o: torch.addcmul(o, y, o.abs(), value=2) if o.ndim <= y.ndim else y,
        lambda y, o: torch.sub(y, o, alpha=3),
        lambda y, o: y.relu(),
        lambda y, o: y.flatten(2).unflatten(2, (5, 5)),
        lambda y, o: y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        lambda y, o: y.mean((2, 3), keepdim=True) + y,
        lambda y, o: y.to(torch.float64).to(y.dtype),
    ]
    taken = 0
    for batch in (1, 2) * 20:
        chosen = [(steps[draw(len(steps))], draw(len(shapes))) for _ in range(1 + draw(5))]
        allowed = [s for s in shapes if len(s) < 4 or s[0] in (1, batch)]
        operands = [torch.randn(allowed[i % len(allowed)], generator=generator) for _, i in chosen]
        x = torch.randn(batch, 3, 5, 5, generator=generator)
        w = torch.randn(4, 3, 1, 1, generator=generator)

        def fn(x, w, operands, chosen=chosen):
            y = F.conv2d(x, w)
            for (step, _), o in zip(chosen, operands, strict=True):
                y = step(y, o)
            return y

        out, records = folded(fn, x, w, operands)
        taken += sum(r.code.folded for r in records)
        exact = fn(x.double(), w.double(), [o.double() for o in operands])
        torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-4)
    assert taken >= 15


@pytest.mark.parametrize("which", [{"deny": ("convs.*",)}, {"allow": ("stem*", "down*")}])
def test_allow_and_deny(which):
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(2, 3, 8, 8)
    with cbn.options(**which):
        out, records = folded(model, x)
    assert {r.layer for r in records if r.code.folded} == {"stem", "down"}
    assert [r.code for r in records].count(ForwardCode.DENIED) == 4
    with torch.no_grad():
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)


class Named(nn.Module):
    """A layer, a batch norm and a trained scale with names, each on a line of its own."""

    def __init__(self, linear: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4) if linear else nn.Conv2d(3, 4, 3)
        self.norm = (nn.BatchNorm1d if linear else nn.BatchNorm2d)(4)
        self.scale = nn.Sequential(Frozen(4, "functional"))
        spread_statistics(self)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        y = self.norm(y)
        return self.scale(y).relu()


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_layer_has_its_own_name_and_line_also_when_it_was_fused(grad, linear):
    x = torch.randn(3, 3) if linear else torch.randn(2, 3, 6, 6)
    _, (record,) = folded(Named(linear), x, grad=grad)
    assert (record.layer, record.code) == ("layer", ForwardCode.FOLDED)
    line = Named.forward.__code__.co_firstlineno + 1
    assert record.source == f"{__file__}:{line}"


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["layer", "norm", "scale.0"])
def test_allow_and_deny_know_the_layer_and_what_follows(name, grad, linear):
    """The same in training, where layer and batch norm are fused before, and in inference."""
    model, x = Named(linear), torch.randn(3, 3) if linear else torch.randn(2, 3, 6, 6)
    for which, code in (
        ({"allow": (name,)}, ForwardCode.FOLDED),
        ({"allow": ("other",)}, ForwardCode.DENIED),
        ({"deny": (name,)}, ForwardCode.DENIED),
        ({"deny": (name,), "allow": ("*",)}, ForwardCode.DENIED),
    ):
        with cbn.options(**which) as options:
            out, records = folded(model, x, grad=grad)
        if grad and not options.permits("layer", "norm"):
            assert not records  # backward needs the layer's output: there is nothing to fold
        else:
            (record,) = records
            assert (record.layer, record.code) == ("layer", code), which
            assert (record.detail == "layer and norm and scale.0") == (code is ForwardCode.DENIED)
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)


def test_option_is_checked():
    with pytest.raises(ValueError, match="'exact', 'fold', 'auto'"):
        cbn.set_options(forward="fast")


def test_explain_shows_the_kernel_half():
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(2, 3, 8, 8)
    with cbn.options(forward="fold"):
        explanation = cbn.explain(model, x)
    assert sum(r.code.folded for r in explanation.forward) == Residual.pairs
    assert f"FOLDED ({explanation.forward[0].kernel})" in str(explanation)
    assert len(explanation.to_dict()["forward"]) == len(explanation.forward)
    assert not cbn.explain(model, x).forward


def test_the_table_of_explain_says_what_each_number_is_and_why():
    """No two columns of a name; the detail of a refusal; the kernel of all that is rewritten."""
    record = cbn.ForwardRecord(
        *(ForwardCode.DENIED, "a.conv and a.norm", "conv", "relu", "", (1,), 1000, 2000),
        *(0.003, 0.004),
    )
    as_linear = dataclasses.replace(
        record, code=ForwardCode.AS_LINEAR, detail="", kernel="unfolded linear"
    )
    columns = cbn.Explanation((), {}, 1, (record, as_linear))._forward_table().columns
    cells = {str(column.header): list(column.cells) for column in columns}
    assert len(cells) == len(columns)
    assert cells.pop("decision") == [
        f"DENIED: {ForwardCode.DENIED.value} (a.conv and a.norm)",
        "AS_LINEAR (unfolded linear)",
    ]
    assert [row[0] for row in cells.values()] == ["conv", "relu", "1.0 kB", "2.0 kB", "3", "4"]


def test_auto_on_cuda_knows_that_the_bias_is_added_apart():
    """There Inductor adds a convolution's bias in a kernel of its own: nothing would be gained."""
    from convbn_inductor_pass import affine, choice
    from convbn_inductor_pass.aten_ir import Layer, Operand, Step
    from convbn_inductor_pass.fold import Layout

    costs = {}
    for device in ("cpu", "cuda"):
        graph = torch.fx.Graph()
        x, w, shift = (graph.placeholder(name) for name in "xws")
        conv = graph.call_function(
            torch.ops.aten.convolution.default,
            (x, w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        )
        node = graph.call_function(torch.ops.aten.add.Tensor, (conv, shift))
        graph.output(node)
        with torch._subclasses.FakeTensorMode():
            for each, shape in ((x, (1, 4, 9, 9)), (w, (4, 4, 1, 1)), (shift, (4, 1, 1))):
                each.meta["val"] = torch.empty(shape, device=device)
            conv.meta["val"] = node.meta["val"] = torch.empty(1, 4, 9, 9, device=device)
        layer = Layer(conv, x, w, None, Layout(), 1, 4, True)
        chain = affine.AffineChain(layer, (Step(node, "shift", 1, Operand(node=shift)),))
        costs[device] = choice.bytes_moved(chain, None, None, "aten")
    assert costs == {"cpu": (2 * 4 * 81 * 4, 0), "cuda": (0, 0)}


def test_what_the_layers_own_operator_does_not_compute_is_not_counted():
    """An activation after a linear layer stays a kernel of its own, also when bytes are counted."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()).eval()
    x = torch.randn(64, 8)
    _, (kept,) = folded(model, x, forward="auto")
    assert (kept.code, kept.bytes_exact) == (ForwardCode.SLOWER, 0)
    _, (taken,) = folded(model, x, forward="fold")
    assert (taken.code, taken.epilogue) == (ForwardCode.FOLDED, "")
    _, records = folded(nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval(), x, forward="fold")
    assert not records
