"""Whether folding is wanted and pays: the options, the cost model, and names in records."""

from __future__ import annotations

import pytest
import torch
from common import Residual, spread_statistics
from passes.forward_folding.folding import Frozen, codes, folded
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode

import convbn_inductor_pass as cbn
from convbn_inductor_pass import testing
from convbn_inductor_pass.graph.affine import find_chains
from convbn_inductor_pass.passes.forward_folding.decide import bytes_moved, decide
from convbn_inductor_pass.passes.forward_folding.find import FoldCandidate


def test_exact_is_the_default_and_changes_nothing():
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(2, 3, 8, 8)
    assert cbn.get_options().forward == "exact"
    out, records = folded(model, x, forward="exact")
    assert not records
    with testing.fresh_compile(flag=False), torch.no_grad():
        expected = torch.compile(model, backend=testing.post_grad_backend())(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_auto_counts_bytes():
    """Large activations: folded. Large weights: as written."""
    wide = nn.Sequential(nn.Conv2d(512, 512, 1), nn.BatchNorm2d(512), nn.ReLU()).eval()
    long = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()).eval()
    _, (left,) = folded(wide, torch.randn(1, 512, 2, 2), forward="auto")
    _, (taken,) = folded(long, torch.randn(1, 8, 64, 64), forward="auto")
    assert left.code.name == "MORE_BYTES"
    assert left.bytes_folded > left.bytes_exact == 2 * 512 * 4 * 4
    assert taken.code.name == "FOLDED"
    assert taken.bytes_folded == 2 * 8 * 8 * 4


def test_what_the_layers_own_operator_does_not_compute_is_not_counted():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()).eval()
    _, (record,) = folded(model, torch.randn(64, 8), forward="auto")
    assert (record.code.name, record.bytes_exact) == ("MORE_BYTES", 0)


def candidate_on(device):
    """A convolution without a bias, and a shift, on fake tensors."""
    graph = fx.Graph()
    x, w, shift = (graph.placeholder(name) for name in "xws")
    geometry = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    x.meta["desc"] = "an input"  # bodies of higher-order operators have none
    conv = graph.call_function(torch.ops.aten.convolution.default, (x, w, None, *geometry))
    node = graph.call_function(torch.ops.aten.add.Tensor, (conv, shift))
    graph.output(node)
    with FakeTensorMode():
        for each, shape in ((x, (1, 4, 9, 9)), (w, (4, 4, 1, 1)), (shift, (4, 1, 1))):
            each.meta["val"] = torch.empty(shape, device=device)
        conv.meta["val"] = node.meta["val"] = torch.empty(1, 4, 9, 9, device=device)
    (chain,) = find_chains(graph)
    return FoldCandidate(chain, "aten")


@pytest.mark.parametrize(("device", "expected"), [("cpu", (2 * 4 * 81 * 4, 0)), ("cuda", (0, 0))])
def test_inductor_adds_a_bias_apart_on_cuda(device, expected):
    """In a generated kernel of its own, so that nothing is gained."""
    assert bytes_moved(candidate_on(device)) == expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("forward", ["auto", "fold"])
def test_auto_folds_only_where_it_was_measured(device, forward):
    record = decide(candidate_on(device), cbn.Options(forward=forward))
    unknown = (device, forward) == ("cuda", "auto")
    assert record.code.name == ("NOT_MEASURED" if unknown else "FOLDED")


@pytest.mark.parametrize("which", [{"deny": ("convs.*",)}, {"allow": ("stem*", "down*")}])
def test_allow_and_deny(which):
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(2, 3, 8, 8)
    with cbn.options(**which):
        out, records = folded(model, x)
    assert {r.layer for r in records if r.code.rewritten} == {"stem", "down"}
    assert codes(records).count("DENIED") == 4
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


def input_of(linear: bool) -> Tensor:
    return torch.randn(3, 3) if linear else torch.randn(2, 3, 6, 6)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_record_names_the_layer_and_its_line(grad, linear):
    _, (record,) = folded(Named(linear), input_of(linear), grad=grad)
    assert (record.layer, record.code.name) == ("layer", "FOLDED")
    line = Named.forward.__code__.co_firstlineno + 1
    assert record.source == f"{__file__}:{line}"


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("name", ["layer", "norm", "scale.0"])
def test_allow_and_deny_match_the_layer_and_each_step(name, linear):
    model, x = Named(linear), input_of(linear)
    for which, code in (
        ({"allow": (name,)}, "FOLDED"),
        ({"allow": ("other",)}, "DENIED"),
        ({"deny": (name,)}, "DENIED"),
        ({"deny": (name,), "allow": ("*",)}, "DENIED"),
    ):
        with cbn.options(**which):
            out, (record,) = folded(model, x)
        assert (record.layer, record.code.name) == ("layer", code), which
        assert record.detail == ("layer and norm and scale.0" if code == "DENIED" else "")
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-4)


def test_the_cache_key_holds_the_settings_that_decisions_depend_on():
    from convbn_inductor_pass.passes.forward_folding import ForwardFoldingPass

    with testing.fresh_compile():
        before = ForwardFoldingPass().uuid()
        assert ForwardFoldingPass().uuid() == before
        with torch.backends.mkldnn.flags(enabled=False):
            assert ForwardFoldingPass().uuid() != before
        with cbn.options(forward="fold"):
            assert ForwardFoldingPass().uuid() != before


def test_explain_lists_the_layers_with_their_kernels():
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(2, 3, 8, 8)
    with cbn.options(forward="fold"), torch.no_grad():
        explanation = cbn.explain(model, x)
    layers = [r for r in explanation.records if r.kind == "layer"]
    assert codes(layers) == ["FOLDED"] * Residual.pairs
    assert f"FOLDED ({layers[0].kernel})" in str(explanation)
    assert not [r for r in cbn.explain(model, x).records if r.kind == "layer"]
