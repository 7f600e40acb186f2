"""Through Inductor: strides, metadata, autocast, training, symbolic sizes."""

from __future__ import annotations

import copy
import os
import pathlib
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from common import Residual, spread_statistics
from passes.forward_folding.folding import codes, compiled, folded, layer_records, needs_onednn
from torch import Tensor, nn
from torch._dynamo.utils import counters

import convbn_inductor_pass as cbn
from convbn_inductor_pass import testing
from convbn_inductor_pass._torch import registry


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
    with testing.fresh_compile(), torch.no_grad():
        exact = torch.compile(model)(x)
    out, records = compiled(model, x)
    assert codes(records) == ["FOLDED"] * 2
    for a, b in zip(out, exact, strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 1, 1), (1, 1, 1, 1), (2, 3, 8, 8)])
def test_inputs_that_are_contiguous_and_channels_last(shape):
    """oneDNN's result is as its input seems to be, which Inductor cannot see for these."""
    conv = torch.nn.Conv2d(shape[1], 4, 3, padding=2)
    model = torch.nn.Sequential(conv, torch.nn.BatchNorm2d(4), torch.nn.ReLU()).eval()
    x = torch.randn(shape)
    out, records = compiled(model, x)
    assert codes(records) == ["FOLDED"]
    torch.testing.assert_close(out, model(x).detach())


def test_bias_and_weight_with_strides():
    """oneDNN reads memory as if it had no gaps or repeats."""
    torch.manual_seed(0)
    x, w, b = torch.randn(1, 3, 6, 6), torch.randn(3, 3, 3, 8).movedim(3, 0), torch.randn(8, 2)
    for bias in (b[:, 0], b[0, :1].expand(8)):
        fn = lambda x, w, bias: F.conv2d(x, w, bias).relu()  # noqa: E731
        for forward in ("fold", "auto"):
            out, records = folded(fn, x, w, bias, forward=forward)
            assert codes(records) == ["FOLDED"]
            torch.testing.assert_close(out, fn(x, w, bias), rtol=1e-5, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last])
def test_residual_network(fmt):
    """Outputs, strides, and that residual and ReLU are in the kernel."""
    torch.manual_seed(0)
    model = Residual().eval().to(memory_format=fmt)
    x = torch.randn(2, 3, 8, 8).to(memory_format=fmt)
    with testing.fresh_compile(), torch.no_grad():
        expected = torch.compile(model)(x)
    counters.clear()
    out, records = compiled(model, x)
    assert out.stride() == expected.stride()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert codes(records) == ["FOLDED"] * Residual.pairs
    assert counters["inductor"]["convbn_inductor_pass_forward_folding"] == Residual.pairs
    assert counters["inductor"]["mkldnn_conv_binary_unary_fusion_matcher_count"] >= 1


def test_autocast():
    """bfloat16, with a residual after a grouped convolution, on 1x1 maps: no raise."""
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(2, 3, 1, 1)
    outputs = {}
    for forward in ("exact", "fold"):
        cbn.clear_records()
        autocast = torch.autocast("cpu", torch.bfloat16)
        with testing.fresh_compile(), cbn.options(forward=forward), autocast, torch.no_grad():
            outputs[forward] = torch.compile(model)(x)
    assert codes(layer_records()) == ["FOLDED"] * Residual.pairs
    assert outputs["fold"].dtype == outputs["exact"].dtype
    exact = copy.deepcopy(model).double()(x.double()).detach()
    scale = exact.abs().max()
    errors = {k: (v.double() - exact).abs().max() / scale for k, v in outputs.items()}
    assert errors["fold"] <= 2 * errors["exact"] + 2 * torch.finfo(torch.bfloat16).eps


def test_training():
    """The forward of training is folded, too; gradients are those of eval mode."""
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(4, 3, 8, 8)
    exact = copy.deepcopy(model).double()
    reference = testing.outputs_and_gradients(exact, dict(exact.named_parameters()), (x.double(),))
    cbn.clear_records()
    with testing.fresh_compile(), cbn.options(forward="fold"):
        mine = torch.compile(model)
        got = testing.outputs_and_gradients(mine, dict(model.named_parameters()), (x,))
    assert codes(layer_records()) == ["FOLDED"] * Residual.pairs
    for name, gradient in reference[1].items():
        error = (got[1][name].double() - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-4, name


def test_dynamic_batch():
    torch.manual_seed(0)
    model = Residual().eval()
    with testing.fresh_compile(), cbn.options(forward="fold"), torch.no_grad():
        mine = torch.compile(model, backend=testing.post_grad_backend(), dynamic=True)
        for batch in (3, 5, 2):
            x = torch.randn(batch, 3, 8, 8)
            torch.testing.assert_close(mine(x), model(x), rtol=1e-4, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize("through_inductor", [False, True])
def test_metadata_of_what_depends_on_a_folded_layer(through_inductor):
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

    run = compiled if through_inductor else folded
    with registry.passes_added({"post_grad_custom_pre_pass": check}):
        out, _ = run(fn, x, v, w, s)
    torch.testing.assert_close(out, fn(x, v, w, s))
    assert sum(stride == (256, 1, 32, 4) for stride in seen) >= 5  # the layers' and their users'


ON_CUDNN = """
import torch
from torch._dynamo.utils import counters
import convbn_inductor_pass as cbn
from convbn_inductor_pass._torch import inductor

inductor.has_cudnn_epilogues = lambda device: True
cbn.enable(forward="fold")
conv_relu = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
with torch.no_grad():
    torch.compile(conv_relu)(torch.randn(2, 3, 8, 8))
print(*(r.kernel for r in cbn.records()), counters["aot_autograd"]["autograd_cache_hit"])
"""


def test_code_from_the_cache_has_cudnns_operator(tmp_path):
    """In a process that finds the code there, no pass runs that would load it."""
    root = pathlib.Path(__file__).parents[3]
    env = {**os.environ, "PYTHONPATH": str(root), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", ON_CUDNN]
    said = [subprocess.check_output(command, env=env, text=True) for _ in range(2)]
    assert said == ["cudnn 0\n", "cudnn 1\n"]
