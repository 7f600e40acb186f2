"""Graphs before and after the pass, and what is read from the calls in them."""

import expecttest
import pytest
import torch
import torch.nn.functional as F
from common import LAYERS, ConvBN, Residual, example_input
from torch import nn

import convbn_inductor_pass as cbn
from convbn_inductor_pass import Code, testing


def passed(fn, *inputs, **kwargs):
    (result,) = testing.run_pass(fn, *inputs, **kwargs)
    return result


@pytest.fixture(name="x")
def _x():
    torch.manual_seed(0)
    return torch.randn(2, 4, 8, 8)


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_fused_and_right(name):
    torch.manual_seed(0)
    model = ConvBN(LAYERS[name]())
    x = example_input(model.layer, requires_grad=True)
    assert passed(model, x).codes == [Code.FUSED]
    testing.assert_numerics(model, x)


class GraphTest(expecttest.TestCase):
    def test_graph(self):
        model = ConvBN(nn.Conv2d(4, 6, 3, bias=False))
        result = passed(model, torch.randn(2, 4, 8, 8))
        before, after = (_tidy(code) for code in (result.before, result.after))
        self.assertExpectedInline(
            before,
            """\
conv2d = torch.conv2d(x, weight, None, (1, 1), (0, 0), (1, 1), 1)
batch_norm = torch.nn.functional.batch_norm(conv2d, mean, var, gamma, beta, False, 0.1, 1e-05)
relu = torch.nn.functional.relu(batch_norm)""",
        )
        self.assertExpectedInline(
            after,
            """\
conv_bn_eval = FUSED(x, weight, None, gamma, beta, mean, var, 1e-05, (1, 1), (0, 0), (1, 1), \
False, (0, 0), 1)
relu = torch.nn.functional.relu(conv_bn_eval)""",
        )


def _tidy(code: str) -> str:
    """The calls of a graph, with Dynamo's long names replaced by those of the formula."""
    lines = [line.strip() for line in code.splitlines() if " = torch." in line or "conv_bn" in line]
    text = "\n".join(line.split(";")[0] for line in lines)
    for name, short in {
        "model_modules_layer_parameters_weight_": "weight",
        "model_modules_bn_parameters_weight_": "gamma",
        "model_modules_bn_parameters_bias_": "beta",
        "model_modules_bn_buffers_running_mean_": "mean",
        "model_modules_bn_buffers_running_var_": "var",
        "l_arguments_0_": "x",
        "convbn_inductor_pass_autograd_conv_bn_eval": "FUSED",
    }.items():
        text = text.replace(f"l_{name}", short).replace(name, short)
    return text


def test_new_node_keeps_metadata(x):
    model = ConvBN(nn.Conv2d(4, 6, 3))
    seen = []

    def backend(gm, inputs):
        (old,) = [n for n in gm.graph.nodes if n.target is F.batch_norm]
        meta = dict(old.meta)
        testing.run_on_graph(gm)
        (new,) = [n for n in gm.graph.nodes if "conv_bn_eval" in n.name]
        seen.append(new)
        for key in ("example_value", "stack_trace", "nn_module_stack"):
            assert new.meta[key] is meta[key]
        return gm.forward

    torch.compile(model, backend=backend)(x)
    assert len(seen) == 1


SPELLINGS = {
    "F positional": lambda c, m, v, g, b: F.batch_norm(c, m, v, g, b, False, 0.1, 1e-3),
    "F keywords": lambda c, m, v, g, b: F.batch_norm(
        input=c, eps=1e-3, bias=b, weight=g, running_var=v, running_mean=m
    ),
    "F defaults": lambda c, m, v, g, b: F.batch_norm(c, m, v, g, b),
    "torch": lambda c, m, v, g, b: torch.batch_norm(c, g, b, m, v, False, 0.1, 1e-3, True),
    "aten": lambda c, m, v, g, b: torch.ops.aten.batch_norm.default(
        c, g, b, m, v, False, 0.1, 1e-3, False
    ),
    "packet": lambda c, m, v, g, b: torch.ops.aten.batch_norm(
        c, g, b, m, v, False, 0.1, 1e-3, False
    ),
    "native": lambda c, m, v, g, b: torch.native_batch_norm(c, g, b, m, v, False, 0.1, 1e-3)[0],
    "no training": lambda c, m, v, g, b: torch.ops.aten._native_batch_norm_legit_no_training(
        c, g, b, m, v, 0.1, 1e-3
    )[0],
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    "conv",
    [
        lambda x, w, b: torch.conv2d(x, w, b, 1, 1),
        lambda x, w, b: F.conv2d(input=x, padding=(1,), weight=w, bias=b),
        lambda x, w, b: torch.ops.aten.conv2d(x, w, b, padding="same"),
        lambda x, w, b: torch.ops.aten.convolution(
            x, w, b, [1, 1], [1, 1], [1, 1], False, [0, 0], 1
        ),
    ],
)
def test_spellings_read_alike(x, spelling, conv):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
            nn.init.uniform_(self.bn.weight)

        def forward(self, x):
            bn = self.bn
            c = conv(x, self.conv.weight, self.conv.bias)
            return SPELLINGS[spelling](c, bn.running_mean, bn.running_var, bn.weight, bn.bias)

    model = Model().eval()
    assert passed(model, x).codes == [Code.FUSED]
    testing.assert_numerics(model, x)


class Linears(nn.Module):
    """Linear layers before a batch norm, in the forms in which it works on their channels."""

    def __init__(self, form):
        super().__init__()
        self.linear, self.bn, self.form = nn.Linear(4, 6), nn.BatchNorm1d(6), form
        self.eval()

    def forward(self, x):
        c = self.linear(x)
        return {
            "rows": lambda: self.bn(c),
            "flatten": lambda: self.bn(c.flatten(0, 1)).reshape_as(c),
            "view": lambda: self.bn(c.view(-1, 6)),
            "reshape": lambda: self.bn(torch.reshape(c, (x.shape[0] * x.shape[1], 6))),
            "not channels": lambda: self.bn(c),
            "mixed up": lambda: self.bn(c.reshape(-1, 2, 6).transpose(1, 2).reshape(-1, 6)),
        }[self.form]()


@pytest.mark.parametrize(
    ("form", "shape", "code"),
    [
        ("rows", (3, 4), Code.FUSED),
        ("flatten", (3, 5, 4), Code.FUSED),
        ("view", (3, 5, 4), Code.FUSED),
        ("reshape", (3, 5, 4), Code.FUSED),
        ("not channels", (3, 6, 4), Code.UNBATCHED),
        ("mixed up", (3, 4, 4), Code.NOT_AFTER_LAYER),
    ],
)
def test_linear(form, shape, code):
    torch.manual_seed(0)
    model, x = Linears(form), torch.randn(shape, requires_grad=True)
    result = passed(model, x)
    assert result.codes == [code]
    assert (result.before == result.after) is (code is not Code.FUSED)
    testing.assert_numerics(model, x)


@pytest.mark.parametrize(
    "nothing",
    [
        lambda c: F.dropout(c, 0.5, False),
        lambda c: c.contiguous(),
        lambda c: c.to(c.dtype).to(c.device),
        nn.Sequential(nn.Identity(), nn.Dropout(0.3), nn.Dropout2d(0.3)).eval(),
    ],
)
def test_nodes_that_do_nothing_are_seen_through(x, nothing):
    model = ConvBN(nn.Conv2d(4, 6, 3))
    fn = nn.Sequential(model.layer, Apply(nothing), model.bn).eval()
    assert passed(fn, x).codes == [Code.FUSED]
    testing.assert_numerics(fn.double(), x.double())


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    "something",
    [
        lambda c: F.dropout(c, 0.5, True),
        lambda c: c.to(torch.float64).float(),
        lambda c: c.clone(),
        lambda c: c.contiguous(memory_format=torch.channels_last),
        lambda c: c.detach(),
    ],
)
def test_nodes_that_do_something_are_not(x, something):
    model = ConvBN(nn.Conv2d(4, 6, 3))
    result = passed(nn.Sequential(model.layer, Apply(something), model.bn), x)
    assert result.codes == [Code.NOT_AFTER_LAYER]
    assert result.before == result.after


def test_shape_of_the_layers_output_is_not_a_use_of_it(x):
    model = ConvBN(nn.Conv2d(4, 6, 3))

    def fn(x):
        c = model.layer(x)
        return model.bn(c).view(c.size(0), c.shape[1], -1)

    result = passed(fn, x, dynamic=True)
    assert result.codes == [Code.FUSED]


def test_options_by_module_path(x):
    model = Residual()
    x = torch.randn(2, 3, 8, 8)
    with cbn.options(deny=("convs.*",)):
        codes = passed(model, x).codes
    assert [c is Code.DENIED for c in codes] == [False, True, True, True, True, False]
    with cbn.options(allow=("stem*",)):
        codes = passed(model, x).codes
    assert [c is Code.FUSED for c in codes] == [True, False, False, False, False, False]
    assert passed(model, x).codes == [Code.FUSED] * Residual.pairs


def test_objective_speed():
    model = ConvBN(nn.Conv2d(4, 64, 3))  # five times its weight: 11,520 numbers
    small, large = torch.randn(8, 4, 4, 4), torch.randn(8, 4, 8, 8)  # 2,048 and 18,432 out
    assert passed(model, small).codes == [Code.FUSED]
    with cbn.options(objective="speed"):
        assert passed(model, small).codes == [Code.LARGE_WEIGHT]
        assert passed(model, large).codes == [Code.FUSED]


def test_frozen_layers_are_fused_on_request(x):
    model = ConvBN(nn.Conv2d(4, 6, 3))
    model.layer.requires_grad_(False)
    assert passed(model, x).codes == [Code.LAYER_FROZEN]
    with cbn.options(fuse_frozen_layers=True):
        assert passed(model, x).codes == [Code.FUSED]
        testing.assert_numerics(model, x)


def test_running_the_pass_again_changes_nothing():
    def backend(gm, inputs):
        once = testing.run_on_graph(gm)
        twice = testing.run_on_graph(gm)
        assert len(once.codes) == Residual.pairs
        assert twice.codes == []
        assert twice.before == twice.after == once.after
        return gm.forward

    torch.compile(Residual(), backend=backend)(torch.randn(2, 3, 8, 8))


def test_a_failed_rewrite_leaves_the_graph_whole(x):
    """Whatever breaks in the middle of a rewrite, the graph is as it was before."""
    from unittest import mock

    model = ConvBN(nn.Conv2d(4, 6, 3))

    def backend(gm, inputs):
        before = gm.graph.python_code("self").src
        broken = mock.patch.object(
            torch.fx.Graph, "create_node", side_effect=RuntimeError("broken")
        )
        with broken, pytest.raises(RuntimeError, match="broken"):
            testing.run_on_graph(gm)
        gm.graph.lint()
        assert gm.graph.python_code("self").src == before
        return gm.forward

    torch.compile(model, backend=backend)(x)
