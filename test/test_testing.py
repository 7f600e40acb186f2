"""The helpers that ``convbn_inductor_pass.testing`` gives to a model's CI."""

from __future__ import annotations

import pytest
import torch
from common import CONVS, Residual, freeze
from torch import nn

import convbn_inductor_pass as cbn
from convbn_inductor_pass import testing
from convbn_inductor_pass.passes.scale_gradient import rewrite
from convbn_inductor_pass.saved_tensors import saved_for_backward


class TestHelpers:
    x = torch.randn(2, 3, 8, 8)

    def test_assert_fused(self):
        testing.assert_fused(Residual(), self.x, count=Residual.pairs)
        with pytest.raises(AssertionError, match="expected 5 batch norms to be fused"):
            testing.assert_fused(Residual(), self.x, count=5)

    def test_assert_none_left(self):
        model = Residual()
        testing.assert_none_left(model, self.x)
        freeze(model.convs, nn.BatchNorm2d, nn.Conv2d)
        model.bns.requires_grad_(False)
        with pytest.raises(AssertionError, match=r"4 batch norms left alone \(AFFINE_FROZEN\)"):
            testing.assert_none_left(model, self.x)
        testing.assert_none_left(model, self.x, except_codes=[cbn.Code.AFFINE_FROZEN])

    def test_assert_saved_at_most(self):
        nbytes = saved_for_backward(Residual(), self.x).new_bytes
        testing.assert_saved_at_most(Residual(), self.x, nbytes=nbytes)
        with pytest.raises(AssertionError, match="bytes are saved for backward, expected at most"):
            testing.assert_saved_at_most(Residual(), self.x, nbytes=nbytes - 1)

    def test_assert_saved_like_deploy(self):
        model = freeze(Residual(), *CONVS)  # left alone: the convolutions' outputs are saved
        with pytest.raises(AssertionError, match="expected at most"):
            testing.assert_saved_like_deploy(model, self.x)

    def test_assert_numerics_sees_a_wrong_gradient(self, monkeypatch):
        testing.assert_numerics(Residual(), self.x)
        right = rewrite._Rewriting._inner_product

        def wrong(rewriting, weight_gradient):
            inner = right(rewriting, weight_gradient)
            return rewriting.build.call(torch.ops.aten.mul.Tensor, inner, 1.001)

        monkeypatch.setattr(rewrite._Rewriting, "_inner_product", wrong)
        with pytest.raises(AssertionError, match=r"bn.*weight: error .* in tune mode"):
            testing.assert_numerics(Residual(), self.x)
