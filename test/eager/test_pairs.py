"""Which pairs ``turn_on`` finds, what they compute, and how much they save for backward."""

import copy

import pytest
import torch
import torch.nn.functional as F
from common import LAYERS, ConvBN, Residual, channels, example_input, spread_statistics
from eager_helpers import Fn, assert_like_eval, codes, saved_bytes
from eager_models import MODELS, conv_bn, make
from torch import nn
from torch.nn.utils import parametrizations

from bench.libraries import MissingLibrary, require
from convbn_inductor_pass import Code, decisions, turn_off, turn_on


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    model, x, pairs = make(name)
    before = saved_bytes(model, x)
    state = {k: (v.data_ptr(), v.clone()) for k, v in model.state_dict().items()}
    assert_like_eval(model, x, fused=pairs)
    # What is not saved is the convolutions' outputs, all of them and nothing but them.
    made = decisions(model)
    less = before - saved_bytes(model, x) - sum(r.bytes_saved for r in made)
    # Of a ReLU's result of 6912 bytes a mask is saved.
    assert less == (6912 * 3 // 4 if name == "levit" else 0)
    for r in made:
        assert (r.pass_name, r.kind) == ("eager", "batch norm")
        assert r.bytes_saved == (r.output_bytes if r.code is Code.FUSED else 0)
    after = model.state_dict()
    assert list(after) == list(state)
    for key, (pointer, value) in state.items():
        assert after[key].data_ptr() == pointer
        assert torch.equal(after[key], value)


@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("retina", "levit")])
def test_saves_what_deploy_saves(name):
    model, x, _ = make(name)
    deploy = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="unstable"):
        turn_on(deploy, "deploy", example_inputs=(x,))
    norms = [m for m in deploy.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == (1 if name == "densenet" else 0)
    assert saved_bytes(turn_on(model), x) == saved_bytes(deploy, x)


OTHERS = {
    "torchvision.models": ("resnet18", "regnet_y_400mf", "mobilenet_v3_small"),
    "timm": ("resnet18", "efficientnet_b0"),
}


@pytest.mark.parametrize(
    ("library", "name"), [(k, n) for k, names in OTHERS.items() for n in names]
)
def test_models_of_other_packages(library, name):
    try:
        build = getattr(require(library), "get_model" if "vision" in library else "create_model")
    except MissingLibrary as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    model, x = spread_statistics(build(name)).eval(), torch.randn(1, 3, 64, 64)
    wanted = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    before, deploy = saved_bytes(model, x), copy.deepcopy(model)
    turn_on(model)
    after = saved_bytes(model, x)
    assert codes(model) == [Code.FUSED] * wanted
    assert before - after == sum(r.bytes_saved for r in decisions(model))
    with pytest.warns(UserWarning, match="unstable"):
        turn_on(deploy, "deploy", example_inputs=(x,))
    assert after == saved_bytes(deploy, x)
    torch.testing.assert_close(deploy(x), model(x))


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    torch.manual_seed(0)
    model = ConvBN(LAYERS[name]())
    assert_like_eval(model, example_input(model.layer, requires_grad=True), fused=1)


@pytest.mark.parametrize("name", ["conv2d_grouped", "conv_transpose2d_grouped"])
def test_channels_last(name):
    torch.manual_seed(0)
    model = ConvBN(LAYERS[name]()).to(memory_format=torch.channels_last)
    x = example_input(model.layer).contiguous(memory_format=torch.channels_last)
    assert_like_eval(model, x, fused=1)


def test_layer_after_a_layer():
    """As in separable convolutions, in the first forward and under saved-tensor hooks."""
    x = torch.randn(2, 4, 6, 6)
    by_name = Fn(lambda m, x: m.bn(F.conv2d(weight=m.conv.weight, input=m.conv(x))))
    assert_like_eval(by_name, x, fused=1)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), *conv_bn(4, 6), *conv_bn(6, 6))
    assert_like_eval(spread_statistics(model).eval(), x, fused=2)
    assert saved_bytes(turn_off(model), x) > saved_bytes(turn_on(model), x)
    assert codes(model) == [Code.FUSED] * 2


def test_forward_is_evals_and_backward_has_no_convolution_more():
    model, x = Residual(), torch.randn(2, 3, 8, 8)
    expected = model(x)
    turn_on(model)
    for _ in range(2):
        with torch.profiler.profile() as profile:
            y = model(x)
            y.sum().backward()
        assert torch.equal(y, expected)
        names = [e.name for e in profile.events()]
        assert names.count("aten::native_batch_norm_backward") == 0
        assert names.count("aten::convolution_backward") == Residual.pairs


def test_linear_layer_of_more_rows():
    model = Fn(
        lambda m, x: m.bn(m.conv(x)), conv=nn.Linear(4, 5), bn=nn.BatchNorm1d(3)
    )  # dimension 1 is not the layer's channels
    x = torch.randn(2, 3, 4)
    expected = model(x)
    assert torch.equal(turn_on(model)(x), expected)
    assert codes(model) == [Code.UNBATCHED]


@pytest.mark.parametrize("bias_shape", [(6, 5), (1, 5), (6, 1), (1,)])
def test_bias_of_a_linear_layer_that_broadcasts(bias_shape):
    def forward(m, x):
        return m.bn(F.linear(x, m.conv.weight, m.conv.rows))

    model = Fn(forward, conv=nn.Linear(4, 5, bias=False), bn=nn.BatchNorm1d(5))
    model.conv.rows = nn.Parameter(torch.randn(bias_shape))
    assert_like_eval(model, torch.randn(6, 4), fused=len(bias_shape) == 1)


@pytest.mark.parametrize("bias", [False, True])
def test_linear_layer_of_an_input_that_is_not_contiguous(bias):
    linear = nn.Linear(4, 5, bias=bias)
    model = Fn(lambda m, x: m.bn(m.conv(x.mT).flatten(0, 1)), conv=linear, bn=nn.BatchNorm1d(5))
    assert_like_eval(model, torch.randn(2, 4, 3, requires_grad=True), fused=1)


def test_empty_batch():
    model = turn_on(Residual())
    y = model(torch.randn(0, 3, 8, 8))
    y.sum().backward()
    assert y.shape == (0, 5)
    assert not model.stem.weight.grad.any()


def test_shape_of_a_layer_output():
    """Asking for the shape is no use of the output."""

    def forward(m, x):
        c = m.conv(x)
        assert c.shape == (2, 4, 6, 6)
        assert (c.dim(), c.size(1), c.ndim, c.dtype) == (4, 4, 4, torch.float32)
        assert isinstance(c, torch.Tensor)
        assert c.requires_grad
        return m.bn(c)

    model = turn_on(Fn(forward))
    model(torch.randn(2, 4, 6, 6))
    assert codes(model) == [Code.FUSED]
    assert channels(model.conv) == 4


def test_meta_device():
    """It knows no autocast, and raises when asked for it."""
    model = turn_on(Residual().to("meta"))
    assert model(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 5)
    assert codes(model) == [Code.FUSED] * Residual.pairs


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "subclass"])
def test_computed_weights(kind):
    class Standardised(nn.Conv2d):
        def forward(self, x):
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(x, weight, self.bias, self.stride, self.padding)

    conv = {
        "weight_norm": lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
        "spectral_norm": lambda: parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)),
        "subclass": lambda: Standardised(4, 4, 3),
    }[kind]()
    model = Fn(lambda m, x: m.bn(m.conv(x)).relu(), conv=conv)
    assert_like_eval(model, torch.randn(2, 4, 6, 6), fused=1)


def test_functional_calls_and_control_flow():
    def forward(m, x):
        for _ in range(int(x.abs().max() > 100) + 2):
            x = torch.conv2d(x, m.conv.weight, stride=(1, 1), padding="same")
            x = F.batch_norm(x, m.bn.running_mean, m.bn.running_var, eps=1e-3, bias=m.bn.bias)
        return x

    model = Fn(forward)
    assert_like_eval(model, torch.randn(2, 4, 6, 6), fused=2)
    assert_like_eval(turn_off(model), 1000 * torch.randn(2, 4, 6, 6), fused=3)


def test_norm_told_later_not_to_track_statistics():
    """It still has some, and uses them in eval mode."""
    model, x = Fn(lambda m, x: m.bn(m.conv(x))), torch.randn(2, 4, 6, 6)
    model.bn.track_running_stats = False
    assert_like_eval(model, x, fused=1)


def test_batch_norm_under_another_autocast():
    """What autocast changes about the layer is done; the batch norm computes in its dtype."""

    def forward(m, x):
        c = m.conv(x)
        with torch.autocast("cpu", torch.bfloat16):
            return m.bn(c)

    assert_like_eval(Fn(forward), torch.randn(2, 4, 6, 6), fused=1)
