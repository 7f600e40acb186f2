"""One record per call of a batch norm, with where it is and why it was left; and bytes saved."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from common import ConvBN, Residual
from joint_graphs import PassResult, run_on_graph, run_pass
from torch import Tensor, nn
from torch._dynamo.utils import counters

from convbn_inductor_pass import (
    Code,
    PassFailedWarning,
    Record,
    clear_records,
    explain,
    records,
    testing,
)
from convbn_inductor_pass._torch import registry
from convbn_inductor_pass.passes.scale_gradient import rewrite


def records_of(model: nn.Module, *inputs: Tensor, dynamic: bool | None = None) -> list[Record]:
    results = run_pass(model, *inputs, dynamic=dynamic)
    records = [r for result in results for r in result.records]
    return [r for r in records if r.pass_name == "scale_gradient"]


@pytest.fixture(name="x")
def _x() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class TestWhere:
    def test_names(self, x):
        found = records_of(Residual(), x)
        assert [(r.layer, r.batch_norm) for r in found] == [
            ("stem", "stem_bn"),
            *((f"convs.{i}", f"bns.{i}") for i in range(4)),
            ("down", "down_bn"),
        ]
        assert {r.kind for r in found} == {"batch norm"}
        assert found[-1].output_shape == (2, 16, 4, 4)
        assert found[-1].output_bytes == found[-1].bytes_saved == 2 * 16 * 4 * 4 * 4

    def test_line(self, x):
        """That of the user's own call, not of the module that PyTorch has."""

        class Model(ConvBN):
            def forward(self, x):
                c = self.layer(x)
                return self.bn(c)

        [record] = records_of(Model(nn.Conv2d(3, 4, 3)), x)
        path, line = record.source.rsplit(":", 1)
        with open(path) as file:
            assert file.readlines()[int(line) - 1].strip() == "return self.bn(c)"

    def test_calls_of_one_module(self, x):
        """Each has a record of its own."""
        conv, bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        found = records_of(nn.Sequential(conv, bn, nn.ReLU(), conv, bn).eval(), x)
        assert [(r.kind, r.code) for r in found] == [("batch norm", Code.FUSED)] * 2

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_sizes(self, x, dynamic):
        """Symbolic sizes are strings; nothing is recorded twice."""
        found = records_of(Residual(), x, dynamic=dynamic)
        assert len(found) == Residual.pairs
        assert {r.code for r in found} == {Code.FUSED}
        assert isinstance(found[0].output_shape[0], str) == dynamic
        assert found[0].output_bytes == 2 * 8 * 8 * 8 * 4


class TestWhy:
    def test_graph_break(self, x):
        class Broken(ConvBN):
            def forward(self, x):
                c = self.layer(x)
                torch._dynamo.graph_break()
                return self.bn(c)

        [record] = records_of(Broken(nn.Conv2d(3, 4, 3)), x)
        assert (record.code, record.layer) == (Code.LAYER_IN_ANOTHER_GRAPH, "")
        assert record.batch_norm == "bn"

    def test_training_mode(self, x):
        model = Residual()
        model.stem_bn.train()
        found = [r for r in records_of(model, x) if r.kind == "batch norm"]
        assert [r.code for r in found] == [Code.BATCH_STATISTICS] + [Code.FUSED] * 5
        assert found[0].bytes_saved == 0 < found[1].bytes_saved

    @pytest.mark.parametrize("trained", [True, False])
    def test_vmap(self, x, trained):
        """Normalizes first, and moves elements before it multiplies with the weight."""
        model = ConvBN(nn.Conv2d(3, 4, 3))
        model.bn.weight.requires_grad_(trained)
        [record] = records_of(lambda x: torch.vmap(lambda t: model(t))(x), torch.stack([x, x]))
        assert record.code is (Code.UNBATCHED if trained else Code.AFFINE_FROZEN)

    def test_training_mode_is_no_other_scale(self, x):
        [record] = records_of(ConvBN(nn.Conv2d(3, 4, 3)).train(), x)
        assert record.code is Code.BATCH_STATISTICS

    @pytest.mark.parametrize(
        ("frozen", "code"),
        [
            (["bn.weight"], Code.AFFINE_FROZEN),
            (["bn.weight", "bn.bias"], Code.AFFINE_FROZEN),
            (["bn.bias", "layer.bias"], Code.FUSED),
            (["layer.weight"], Code.LAYER_FROZEN),
            (["layer.weight", "layer.bias"], Code.LAYER_FROZEN),
            (["layer.weight", "layer.bias", "bn.weight", "bn.bias"], Code.NO_GRAD),
        ],
    )
    def test_frozen(self, x, frozen, code):
        model = ConvBN(nn.Conv2d(3, 4, 3))
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        [record] = records_of(model, x)
        assert record.code is code

    def test_follows_no_layer(self, x):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)).eval()
        [record] = records_of(model, x)
        assert (record.code, record.detail) == (Code.NOT_AFTER_LAYER, "it follows relu")

    def test_batch_norm_after_batch_norm(self, x):
        """Both gradients are made of one weight gradient: neither input is saved."""
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)).eval()
        assert [r.code for r in records_of(model, x)] == [Code.FUSED, Code.FUSED]


class TestBytes:
    def test_saved_anyway(self, x):
        """SiLU's gradient is computed from its input: nothing is gained."""
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU()).eval()
        explanation = explain(model, x)
        [record] = explanation.records
        assert (record.code, record.bytes_saved) == (Code.SAVED_ANYWAY, 0)
        assert explanation.saved_bytes["tune"] == explanation.saved_bytes["eval"]

    @pytest.mark.parametrize("dynamic", [None, True])
    def test_sum_to_the_difference(self, x, dynamic):
        explanation = explain(Residual(), x, dynamic=dynamic)
        saved = explanation.saved_bytes
        total = sum(r.bytes_saved for r in explanation.records)
        assert total == saved["eval"] - saved["tune"] > 0
        assert all(r.bytes_saved > 0 for r in explanation.records)

    def test_pairs_left_alone_in_between(self, x):
        model = Residual()
        model.convs[1].requires_grad_(False)
        model.bns[2].requires_grad_(False)
        explanation = explain(model, x)
        saved = explanation.saved_bytes
        by_code = {r.code: r.bytes_saved for r in explanation.records if r.code is not Code.FUSED}
        # The frozen layer's input is what only its shape is read of.
        size = x.shape[0] * 8 * 8 * 8 * (4 - 1)  # less a mask of its sign
        assert by_code == {Code.LAYER_FROZEN: 0, Code.AFFINE_FROZEN: 0, Code.SHAPE_ONLY: size}
        total = sum(r.bytes_saved for r in explanation.records)
        assert total == saved["eval"] - saved["tune"] > 0


class TestPublished:
    def test_by_compiling(self, x):
        """With the counters; in the next compilation again."""
        model = Residual()
        model.stem_bn.requires_grad_(False)
        clear_records()
        counters.clear()
        for calls in (1, 2):
            with testing.fresh_compile():
                torch.compile(model, backend=testing.post_grad_backend())(x)
            codes = [r.code for r in records()]
            assert codes == ([Code.AFFINE_FROZEN] + [Code.FUSED] * 5) * calls
            for name in ("efficient_conv_bn_eval", "convbn_inductor_pass_scale_gradient"):
                assert counters["inductor"][name] == 5 * calls
        clear_records()
        assert records() == []

    def test_not_without_the_flag(self, x):
        clear_records()
        with testing.fresh_compile(flag=False):
            torch.compile(Residual(), backend=testing.post_grad_backend())(x)
        assert records() == []


@pytest.mark.parametrize(("method", "call"), [("_inner_product", 2), ("_replace", 3)])
def test_a_failure_half_way_leaves_a_right_graph(method, call, monkeypatch):
    """What was replaced until then may use what stands later in the graph."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4), nn.BatchNorm1d(4)
    ).eval()
    x, parameters = torch.randn(5, 4, requires_grad=True), dict(model.named_parameters())
    expected = testing.outputs_and_gradients(model, parameters, (x,))
    calls, whole = [], getattr(rewrite._Rewriting, method)

    def fails_midway(*args):
        calls.append(args)
        if len(calls) == call:
            raise RuntimeError("on purpose")
        return whole(*args)

    monkeypatch.setattr(rewrite._Rewriting, method, fails_midway)
    clear_records()
    with testing.fresh_compile():
        compiled = torch.compile(model, backend=testing.post_grad_backend())
        with pytest.warns(PassFailedWarning, match="on purpose"):
            actual = testing.outputs_and_gradients(compiled, parameters, (x,))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert records() == []


def test_running_again_changes_nothing(x):
    """Nothing is left that is summed over."""
    seen: list[PassResult] = []

    def twice(graph: torch.fx.Graph) -> None:
        first, second = run_on_graph(graph), run_on_graph(graph)
        assert first.before != first.after == second.before == second.after
        seen.append(first)

    added = registry.passes_added({"joint_custom_pre_pass": twice})
    with testing.fresh_compile(flag=False), added:
        torch.compile(Residual(), backend=testing.post_grad_backend())(x)
    assert [r.codes for r in seen] == [[Code.FUSED] * Residual.pairs]


def test_epilogue_of_relu_only(x):
    """The mask of ReLU is what is left to be saved."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()).eval()
    [record] = explain(model, x).records
    out = F.conv2d(x, torch.zeros(4, 3, 3, 3), padding=1)
    assert record.bytes_saved == out.numel() * 4
