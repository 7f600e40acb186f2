"""``explain``: what is said about a model, as text and as data."""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from common import Residual, UNet, freeze
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
        assert sum(t["nbytes"] for t in data["saved_tensors"]["tune"]) == saved["tune"]

    def test_no_batch_norm(self):
        text = str(cbn.explain(nn.Linear(3, 4), torch.randn(2, 3)))
        assert "There is no batch norm in what torch.compile sees" in text

    def test_graph_breaks(self):
        class Broken(Residual):
            def forward(self, x):
                x = F.relu(self.stem_bn(self.stem(x)))
                torch._dynamo.graph_break()
                return F.relu(self.down_bn(self.down(x)))

        explanation = cbn.explain(Broken(), torch.randn(2, 3, 8, 8))
        assert explanation.graphs == 2
        assert explanation.fused == 2

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
