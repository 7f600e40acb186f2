"""Bytes saved for backward: tune mode's are deploy's, and never more than eval mode's."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from common import CONVS, LAYERS, ConvBN, Residual, UNet, example_input, freeze
from torch import nn
from torch._inductor.fx_passes import pre_grad
from torch._inductor.fx_passes.freezing_patterns import binary_folding_pass
from torch._subclasses import FakeTensorMode
from torch.torch_version import TorchVersion

import convbn_inductor_pass as cbn
from bench.providers import PROVIDERS
from convbn_inductor_pass import testing
from convbn_inductor_pass._torch import registry
from convbn_inductor_pass.passes import PASSES
from convbn_inductor_pass.saved_tensors import SavedForBackward, SavedTensor, saved_for_backward

HOOKS = sorted({p.hook for p in PASSES})


class Frozen(nn.Module):
    """A residual model whose batch norms are written out, with buffers: FrozenBatchNorm2d."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        for i in (1, 2):
            self.register_buffer(f"scale{i}", torch.rand(1, 8, 1, 1))
            self.register_buffer(f"shift{i}", torch.rand(1, 8, 1, 1))

    def forward(self, x):
        x = F.relu(self.conv1(x) * self.scale1 + self.shift1)
        return F.relu(self.conv2(x) * self.scale2 + self.shift2)


def pooling_input(model):
    """Bytes less since max-pooling's backward, before torch 2.13, reads the shape of its input.

    The next convolution's input, which is a quarter, is then saved instead.
    """
    old = TorchVersion(torch.__version__) < "2.13"
    return (2 * 4 * 16 * 16 - 2 * 4 * 8 * 8) * 4 if isinstance(model, UNet) and old else 0


@pytest.mark.parametrize("model", [Residual, UNet])
def test_as_deploy_where_all_is_trainable(model):
    model, x = model(), torch.randn(2, 3, 16, 16)
    saved = {m: saved_for_backward(model, x, mode=m) for m in ("eval", "builtin", "tune", "deploy")}
    assert saved["tune"].new_bytes == saved["deploy"].new_bytes - pooling_input(model)
    assert saved["tune"].new_bytes < saved["builtin"].new_bytes < saved["eval"].new_bytes
    assert saved["tune"].bytes_of("weight") == 0 < saved["builtin"].bytes_of("weight")
    testing.assert_saved_like_deploy(model, x)


@pytest.mark.parametrize("name", LAYERS)
def test_as_deploy_for_every_layer(name):
    model = ConvBN(LAYERS[name]())
    x = example_input(model.layer, requires_grad=True)
    testing.assert_saved_like_deploy(model, x)


@pytest.mark.parametrize("model", [Residual, UNet])
@pytest.mark.parametrize("kinds", [(nn.BatchNorm2d,), CONVS, (nn.BatchNorm2d, *CONVS)])
def test_never_more_than_eval(model, kinds):
    model = freeze(model(), *kinds)
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    explanation = cbn.explain(model, x)
    assert explanation.fused == 0
    saved = explanation.saved_bytes
    if nn.Conv2d in kinds:  # whose input backward then reads the shape of
        assert saved["tune"] < saved["eval"]
    else:
        assert saved["tune"] == saved["eval"] - pooling_input(model)
    with cbn.options(fuse_frozen_layers=True):
        saved = cbn.explain(model, x).saved_bytes
    assert saved["tune"] <= saved["eval"]


def test_frozen_layers_on_request_save_less():
    model, x = freeze(Residual(), *CONVS), torch.randn(2, 3, 16, 16)
    with cbn.options(fuse_frozen_layers=True):
        saved = cbn.explain(model, x).saved_bytes
    assert saved["tune"] < saved["eval"]


def test_batch_norm_written_out_is_as_it_was():
    """Of masks, bits are saved."""
    saved = cbn.explain(Frozen(), torch.randn(2, 3, 16, 16)).saved
    assert saved["tune"].bytes_of("activation") == saved["eval"].bytes_of("activation")
    assert saved["eval"].tensors == saved["deploy"].tensors
    assert saved["tune"].bytes_of("mask") * 8 == saved["eval"].bytes_of("mask") > 0


def test_exact_numbers():
    # conv -> bn -> relu, and a gradient for the input: eval mode saves x (an input: not new),
    # the conv's output and relu's mask; tune mode the mask alone.
    model = ConvBN(nn.Conv2d(4, 6, 3, padding=1))
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    numbers = 2 * 6 * 8 * 8
    saved = {m: saved_for_backward(model, x, mode=m) for m in ("eval", "tune", "deploy")}
    assert [(t.kind, t.nbytes) for t in saved["eval"].tensors] == [
        ("activation", 4 * numbers),
        ("mask", numbers),
    ]
    for mode in ("tune", "deploy"):
        assert [(t.kind, t.nbytes) for t in saved[mode].tensors] == [("mask", numbers)]


@pytest.mark.parametrize(("mode", "fuse"), [("eval", False), ("tune", True)])
def test_agrees_with_what_autograd_is_given(mode, fuse):
    """The prediction against the tensors that a compiled function really saves."""
    model, x = Residual(), torch.randn(2, 3, 16, 16)
    alive = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    packed = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in alive:
            packed[t.untyped_storage().data_ptr()] = t.numel() * t.element_size()
        return t

    compiled = torch.compile(model, backend=testing.fast_backend(fuse=fuse))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = compiled(x)
    assert sum(packed.values()) == saved_for_backward(model, x, mode=mode).new_bytes > 0
    del out


def test_allocates_nothing_and_runs_nothing():
    model = Residual()
    with FakeTensorMode():
        x = torch.empty(2**16, 3, 512, 512)  # 200 GB
    before = {n: t.clone() for n, t in model.state_dict().items()}
    explanation = cbn.explain(model, x)
    assert explanation.fused == Residual.pairs
    assert explanation.saved_bytes["tune"] > 2**40
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
        assert not isinstance(tensor, torch._subclasses.FakeTensor)


def test_leaves_counters_and_records_alone():
    from torch._dynamo.utils import counters

    cbn.clear_records()
    before = {k: dict(v) for k, v in counters.items()}
    cbn.explain(Residual(), torch.randn(2, 3, 8, 8))
    saved_for_backward(Residual(), torch.randn(2, 3, 8, 8), mode="builtin")
    assert {k: dict(v) for k, v in counters.items()} == before
    assert cbn.records() == []
    assert cbn.is_installed()


@pytest.mark.parametrize("overwritten", [None, *HOOKS])
def test_what_runs_in_inductors_hooks_is_left_as_it_was(overwritten):
    """Passes of others, before and after ours, and that one of ours was overwritten."""

    def other(*graphs):
        pass

    def state():
        wrapped = (pre_grad.efficient_conv_bn_eval_pass, binary_folding_pass)
        return (
            [getattr(registry.config, name) for name in HOOKS],
            [p.apply for p in wrapped],
            cbn.is_installed(),
        )

    with contextlib.ExitStack() as stack:
        stack.enter_context(registry.passes_added(dict.fromkeys(HOOKS, other)))
        if overwritten is not None:
            stack.enter_context(registry.config.patch({overwritten: None}))
        before = state()
        saved_for_backward(Residual(), torch.randn(2, 3, 8, 8), mode="builtin")
        assert state() == before
        for name in ("eval", "ours"):
            with PROVIDERS[name].active():
                assert cbn.is_installed() == (name == "ours")
            assert state() == before
    assert cbn.is_installed()


def test_dynamic_shapes():
    saved = cbn.explain(Residual(), torch.randn(2, 3, 16, 16), dynamic=True)
    assert saved.fused == Residual.pairs
    assert isinstance(saved.records[0].output_shape[0], str)
    static = cbn.explain(Residual(), torch.randn(2, 3, 16, 16))
    assert saved.saved_bytes["tune"] == static.saved_bytes["tune"] == saved.saved_bytes["deploy"]


def test_shapes_of_an_earlier_call_do_not_matter():
    model = Residual()
    for shape in ((4, 3, 32, 32), (2, 3, 16, 16)):
        explanation = cbn.explain(model, torch.randn(shape))
        assert explanation.records[0].output_shape == (shape[0], 8, *shape[2:])


def test_unknown_mode():
    with pytest.raises(ValueError, match="mode must be one of eval, builtin, tune, deploy, got"):
        saved_for_backward(Residual(), torch.randn(2, 3, 8, 8), mode="train")


def test_peak_of_two_layers():
    """The backward has, besides the output's gradient, first dw2, then dh, then dw1."""
    rows, width, hidden, out = 7, 5, 11, 3
    w1, w2 = (torch.randn(*s, requires_grad=True) for s in ((width, hidden), (hidden, out)))
    x = torch.randn(rows, width)
    saved = saved_for_backward(lambda x: x @ w1 @ w2, x)
    h, dy, dw1, dw2 = (
        4 * a * b for a, b in ((rows, hidden), (rows, out), (width, hidden), (hidden, out))
    )
    assert saved.new_bytes == h
    backward = (h + dy + dw2, dy + dw2 + h, dw2 + h + dw1)  # dh is as large as h
    assert saved.peak_bytes == max(h + dy, *backward)


def test_peak_of_graphs_one_after_the_other():
    first, second = (
        SavedForBackward((SavedTensor("", (), "", n, "activation"),), 0, p)
        for n, p in ((5, 9), (7, 20))
    )
    assert (first + second).peak_bytes == 25
    assert (second + first).peak_bytes == 20
