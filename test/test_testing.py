"""The helpers that ``convbn_inductor_pass.testing`` gives to a model's CI."""

from __future__ import annotations

import functools

import pytest
import torch
from common import CONVS, Residual, freeze
from torch import nn

import convbn_inductor_pass as cbn
from convbn_inductor_pass import testing
from convbn_inductor_pass.passes.scale_gradient import rewrite
from convbn_inductor_pass.saved_tensors import saved_for_backward


class TestHelpers:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    @pytest.fixture(autouse=True)
    def _seed(self):
        torch.manual_seed(0)

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

    def test_assert_none_left_sees_what_is_not_compiled(self):
        class Model(Residual):
            @torch.compiler.disable
            def rest(self, x):
                return self.down_bn(self.down(x))

            def forward(self, x):
                return self.rest(self.stem_bn(self.stem(x)).relu())

        model = Model()
        del model.convs, model.bns
        with pytest.raises(AssertionError, match=r"1 batch norm left alone \(NOT_COMPILED\)"):
            testing.assert_none_left(model, self.x)
        testing.assert_none_left(model, self.x, except_codes=[cbn.Code.NOT_COMPILED])
        disabled = torch.compiler.disable(model)
        for check in (
            testing.assert_none_left,
            testing.assert_saved_like_deploy,
            functools.partial(testing.assert_saved_at_most, nbytes=1 << 40),
        ):
            with pytest.raises(AssertionError, match="Dynamo captures no graph"):
                check(disabled, self.x)
        with pytest.raises(TypeError, match="must be members of Code, got 'NOT_COMPILED'"):
            testing.assert_none_left(model, self.x, except_codes=["NOT_COMPILED"])

    def test_many_traces_leave_compilation_on(self):
        """A frame after a graph break has a cache entry for each trace, and Dynamo a limit."""

        class Model(Residual):
            def forward(self, x):
                x = self.stem_bn(self.stem(x)).relu()
                torch._dynamo.graph_break()
                return self.down_bn(self.down(x))

        del (model := Model()).convs, model.bns
        graphs = []
        compiled = torch.compile(model, backend=lambda gm, _: graphs.append(gm) or gm.forward)
        torch.compile(model)(self.x)  # a backend without a hash
        compiled(self.x)
        for _ in range(torch._dynamo.config.recompile_limit):
            testing.assert_none_left(model, self.x)
        compiled(self.x[:, :, 1:])
        assert len(graphs) == 4

    def test_fresh_compile_leaves_no_code_if_its_block_fails(self):
        compiled = []

        def backend(gm, inputs):
            compiled.append(gm)
            return gm.forward

        fn = torch.compile(lambda x: x.sin(), backend=backend)

        def compile_and_fail():
            fn(self.x)
            raise KeyError

        with pytest.raises(KeyError), testing.fresh_compile():
            compile_and_fail()
        fn(self.x)
        assert len(compiled) == 2

    def test_assert_saved_at_most(self):
        nbytes = saved_for_backward(Residual(), self.x).all_bytes
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

    @pytest.mark.parametrize("zero", ["key_bias", "trained_batch_norm"])
    def test_assert_numerics_where_a_gradient_is_all_rounding(self, zero):
        """In theory it is zero; eval mode's error in it is no measure for other gradients."""

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
                self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
                self.conv, self.bn = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

            def forward(self, x):
                x = self.stem(x)
                if zero == "trained_batch_norm":
                    return self.bn(self.conv(x))
                t = x.flatten(2).mT
                return (self.q(t) @ self.k(t).mT).softmax(-1) @ self.v(t)

        def thousandfold(*, fuse):
            backend = testing.fast_backend(fuse=fuse)

            def compile(gm, inputs):
                compiled = backend(gm, inputs)
                return lambda *args: compiled(*(change(t) if fuse else t for t in args))

            return compile

        def change(t):
            return _Thousandfold.apply(t) if getattr(t, "shape", ()) == (8, 3, 3, 3) else t

        model = Model().eval()
        model.bn.train(zero == "trained_batch_norm")
        testing.assert_numerics(model, self.x)
        with pytest.raises(AssertionError, match=r"stem.0.weight: error 9.99e\+02 in tune mode"):
            testing.assert_numerics(model, self.x, backend=thousandfold)

    def test_assert_numerics_leaves_gradients_and_takes_integers(self):
        class Model(Residual):
            def forward(self, x):
                y = super().forward(x)
                return y, y.argmax(1)

        model = Model()
        model.stem.weight.grad = gradient = torch.ones_like(model.stem.weight)
        assert "output1" not in testing.assert_numerics(model, self.x)
        assert model.stem.weight.grad is gradient


class _Thousandfold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 1000 * g
