"""``explain``: what is said about a model, as text and as data."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import json

import pytest
import torch
import torch.nn.functional as F
from common import ConvBN, Residual, UNet, freeze
from torch import nn

import convbn_inductor_pass as cbn


class TestExplain:
    def test_text_and_dict(self):

        explanation = cbn.explain(UNet(), torch.randn(2, 3, 16, 16))
        text = str(explanation)
        assert "down1.0" in text
        assert "FUSED" in text
        assert "4 of 4 batch norms in tune mode, 1 graph(s)." in text
        saved = explanation.saved_bytes
        assert f"tune mode: {saved['tune']:,} bytes" in text
        data = json.loads(json.dumps(explanation.to_dict()))
        assert data["fused"] == data["batch_norms"] == 4
        assert data["saved_bytes"] == saved
        copied = explanation.saved["tune"].copied_bytes
        assert sum(t["nbytes"] for t in data["saved_tensors"]["tune"]) + copied == saved["tune"]

    def test_symbolic_sizes_are_short(self):
        """In the table: what is computed from other sizes is a question mark."""
        explanation = cbn.explain(Residual(), torch.randn(4, 3, 16, 16), dynamic=True)
        shapes = [r.output_shape for r in explanation.batch_norms]
        assert any("//" in str(size) for shape in shapes for size in shape)
        text = str(explanation)
        assert "//" not in text
        assert "x?x?" in text

    def test_a_record_is_a_line(self):
        record = cbn.Record("scale_gradient", "batch norm", cbn.Code.FUSED, "mul", "c", "bn", "f:1")
        assert str(record) == "scale_gradient: c -> bn FUSED mul (f:1)"
        mask = cbn.Record("mask_bits", "mask", cbn.Code.MASK_AS_BITS, layer="relu", source="f:2")
        assert str(mask) == "mask_bits: relu MASK_AS_BITS (f:2)"

    def test_keyword_inputs(self):
        class Masked(ConvBN):
            def forward(self, x, *, mask):
                return super().forward(x) * mask

        model, x = Masked(nn.Conv2d(4, 6, 3)), torch.randn(2, 4, 8, 8)
        explanation = cbn.explain(model, x, kwargs={"mask": torch.ones(6, 6)})
        assert explanation.fused == 1
        assert explanation.batch_norms[0].layer == "layer"

    def test_autocast(self):
        x = torch.randn(2, 3, 16, 16)
        with torch.autocast("cpu", torch.bfloat16):
            expected = cbn.explain(Residual(), x).saved_bytes
        assert cbn.explain(Residual(), x, autocast=torch.bfloat16).saved_bytes == expected
        assert cbn.explain(Residual(), x).saved_bytes != expected

    def test_as_it_would_be_trained(self):
        """Frozen by pattern, BN-tuning, channels-last: as the model itself so trained."""
        model, x = Residual(), torch.randn(2, 3, 16, 16)
        found = cbn.explain(model, x, freeze=["*"], train_bn=True, channels_last=True)
        assert all(p.requires_grad for p in model.parameters())
        assert model.stem.weight.is_contiguous()
        model = freeze(Residual(), nn.Conv2d, nn.Linear).to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
        expected = cbn.explain(model, x)
        assert found.saved_bytes == expected.saved_bytes
        assert [r.code for r in found.records] == [r.code for r in expected.records]
        assert {r.code for r in found.batch_norms} == {cbn.Code.LAYER_FROZEN}

    def test_patterns_name_a_compiled_models_parameters_like_the_models(self):
        model, x = Residual(), torch.randn(2, 3, 16, 16)
        expected, found = (
            cbn.explain(m, x, freeze=["stem.*"]) for m in (model, torch.compile(model))
        )
        assert found.saved_bytes == expected.saved_bytes
        assert expected.saved_bytes != cbn.explain(model, x).saved_bytes

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda x: cbn.explain(Residual, x), TypeError, "got the class Residual"),
            (lambda x: cbn.explain(None, x), TypeError, "must be a module or a function, got None"),
            (lambda x: cbn.explain(len, x, train_bn=True), TypeError, "need a module"),
            (lambda x: cbn.explain(Residual(), x[:, :2]), ValueError, "to have 3 channels, but"),
            (lambda x: cbn.explain(Residual()), ValueError, "does not run on these inputs"),
            (
                lambda x: cbn.explain(Residual(), x, freeze=["layer9.*"]),
                ValueError,
                "'layer9.*' matches no parameter; the model has stem.weight, ",
            ),
            (lambda x: cbn.explain(Residual(), x, freeze="stem.*"), ValueError, "['stem.*']"),
            (
                lambda x: cbn.explain(Residual(), x, autocast="bfloat16"),
                ValueError,
                "must be torch.bfloat16 or torch.float16, got 'bfloat16'",
            ),
            (lambda x: cbn.explain(Residual().to("meta"), x), ValueError, "no meta device"),
            (
                lambda x: cbn.explain(nn.LazyConv2d(4, 1), x),
                ValueError,
                "run the model once",
            ),
        ],
    )
    def test_errors_are_one_line(self, call, error, message):
        before = torch._inductor.config.efficient_conv_bn_eval_fx_passes
        with pytest.raises(error) as raised:
            call(torch.randn(2, 3, 8, 8))
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)
        assert torch._inductor.config.efficient_conv_bn_eval_fx_passes == before

    def test_copies_in_another_layout(self):
        """Inductor makes a contiguous model channels-last, and saves what it has copied."""
        model, x = Residual(), torch.randn(2, 3, 16, 16)
        explanation = cbn.explain(model, x)
        weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
        copied = [w for w in weights if not w.is_contiguous(memory_format=torch.channels_last)]
        saved = explanation.saved["tune"]
        assert saved.copied_bytes >= sum(w.nbytes for w in copied[1:]) > 0
        assert explanation.saved_bytes["tune"] == saved.new_bytes + saved.copied_bytes
        assert "channels-last copies" in str(explanation)
        there = cbn.explain(model, x, channels_last=True)
        assert there.saved["tune"].copied_bytes == 0
        assert "channels-last copies" not in str(there)

    def test_channels_last_is_for_four_dimensions(self):
        model = nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4)).eval()
        assert cbn.explain(model, torch.randn(2, 3, 8, 8, 8), channels_last=True).fused == 1

    def test_picture(self, tmp_path):
        pytest.importorskip("matplotlib")
        cbn.explain(Residual(), torch.randn(2, 3, 16, 16)).save_picture(tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

    def test_no_batch_norm(self):
        text = str(cbn.explain(nn.Linear(3, 4), torch.randn(2, 3)))
        assert "There is no batch norm in the graphs that torch.compile sees" in text

    def test_graph_breaks(self):
        class Broken(Residual):
            def forward(self, x):
                x = F.relu(self.stem_bn(self.stem(x)))
                torch._dynamo.graph_break()
                return F.relu(self.down_bn(self.down(x)))

        explanation = cbn.explain(Broken(), torch.randn(2, 3, 8, 8))
        assert explanation.graphs == 2
        assert explanation.fused == 2

    @pytest.mark.parametrize("call", ["module", "method", "partial", "step", "wrong"])
    def test_leaves_the_module_as_it_was(self, call):
        class Stateful(Residual):
            def __init__(self):
                super().__init__()
                self.register_buffer("steps", torch.zeros((), dtype=torch.long))
                self.register_buffer("table", None, persistent=False)
                self.all, self.by_name = [], {"nested": {}}

            def forward(self, x):
                self.steps += 1
                self.last = y = super().forward(x)
                self.all.append(y)
                self.by_name["nested"]["y"] = y
                if self.table is None:
                    self.table = torch.arange(y.shape[-1], dtype=y.dtype)
                return self.table * (y if call != "wrong" else y @ x)

        model = Stateful().train()
        names = [dict(m.__dict__) for m in model.modules()]
        state = copy.deepcopy(model.state_dict())
        model.stem.weight.grad = gradient = torch.ones_like(model.stem.weight)

        def step(x):
            model(x).sum().backward()

        run = {"method": model.forward, "step": step}.get(call, model)
        run = functools.partial(model) if call == "partial" else run
        with (
            pytest.raises(ValueError, match="does not run")
            if call == "wrong"
            else contextlib.nullcontext()
        ):
            cbn.explain(run, torch.randn(2, 3, 8, 8))
        for before, module in zip(names, model.modules(), strict=True):
            assert {k: id(v) for k, v in before.items()} == {
                k: id(v) for k, v in module.__dict__.items()
            }
        assert model.table is None
        assert model.all == []
        assert model.by_name == {"nested": {}}
        assert model.stem.weight.grad is gradient
        assert gradient.eq(1).all()
        assert all(p is model.stem.weight or p.grad is None for p in model.parameters())
        torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)

    def test_batch_norms_in_no_graph(self):
        class Model(Residual):
            def forward(self, x):
                return self.stem_bn(self.stem(x))

        model = Model()
        model.bns.append(model.stem_bn)  # under a second path
        explanation = cbn.explain(torch.compile(model), torch.randn(2, 3, 8, 8))
        assert explanation.fused == len(explanation.batch_norms) == 1
        left = explanation.left()
        assert {r.code for r in left} == {cbn.Code.NOT_COMPILED}
        assert [r.batch_norm for r in left] == [*(f"bns.{i}" for i in range(4)), "down_bn"]
        assert "TORCH_LOGS=graph_breaks" in str(explanation)

    @pytest.mark.parametrize("how", ["break inside", "traced", "compiled", "data parallel"])
    def test_batch_norms_under_other_names_are_compiled(self, how):
        """Of a frame after a graph break, a graph of torch.fx, a wrapper."""

        class Broken(ConvBN):
            def forward(self, x):
                c = self.layer(x)
                torch._dynamo.graph_break()
                return self.bn(c.relu())

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = Broken(nn.Conv2d(3, 4, 1)), Broken(nn.Conv2d(4, 4, 1))

            def forward(self, x):
                return self.b(self.a(x))

        model = Model().eval()
        if how == "traced":
            model = torch.fx.symbolic_trace(Residual())
        elif how == "compiled":
            model = torch.compile(model, backend="eager")
        elif how == "data parallel":
            model = nn.DataParallel(Residual())
        explanation = cbn.explain(model, torch.randn(2, 3, 8, 8))
        assert cbn.Code.NOT_COMPILED not in {r.code for r in explanation.records}
        assert explanation.batch_norms

    def test_containers_of_other_classes_are_left_alone(self):
        class Strict(collections.OrderedDict):
            def update(self, *args, **kwargs):
                raise RuntimeError("no update")

        class Model(Residual):
            def forward(self, x):
                self.calls.append(1)
                self.recent.append(2)
                return super().forward(x)

        model = Model()
        model.strict = Strict(a=1)
        model.calls, model.recent = [], collections.deque(maxlen=3)
        model.own = {"itself": model.calls}
        model.own["cycle"] = model.own
        assert cbn.explain(model, torch.randn(2, 3, 8, 8)).fused == Residual.pairs
        assert dict(model.strict) == {"a": 1}
        assert model.calls == []
        assert list(model.recent) == []
        assert model.own["itself"] is model.calls

    def test_reasons_are_told(self):
        model = Residual()
        model.stem_bn.train()
        freeze(model.convs, nn.Conv2d)
        explanation = cbn.explain(model, torch.randn(2, 3, 8, 8))
        codes = [r.code.name for r in explanation.batch_norms]
        assert codes == ["BATCH_STATISTICS"] + ["LAYER_FROZEN"] * 4 + ["FUSED"]
        # rich wraps long cells: compare words
        words = " ".join(str(explanation).replace("│", " ").split())
        assert "is in training mode" in words
        left = explanation.left(except_codes=(cbn.Code.LAYER_FROZEN,))
        assert [r.batch_norm for r in left] == ["stem_bn"]
