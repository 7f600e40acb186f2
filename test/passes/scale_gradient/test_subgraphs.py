"""Pairs in the bodies of higher-order operators, and in checkpoints."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same_as_unfused
from programs import (
    PARAMETERS,
    arguments,
    bn,
    carried,
    check,
    conv_bn,
)
from torch._higher_order_ops import scan, while_loop
from torch._higher_order_ops.map import map as map_
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from convbn_inductor_pass import Code, explain


@torch.compiler.nested_compile_region
def region(*args):
    return conv_bn(*args).relu()


class TestSubgraphs:
    """The bodies of cond, scan, map and while_loop are partitioned by PyTorch on its own."""

    def test_checkpoint(self):
        def fn(x, *rest):
            return checkpoint(lambda x: conv_bn(x, *rest).relu(), x, use_reentrant=False) * 2

        check(fn, arguments(grad=("x",)), Code.FUSED)

    @pytest.mark.parametrize("policy", [None, CheckpointPolicy.MUST_SAVE])
    def test_checkpoint_decides_what_is_saved(self, policy):
        """A plain one saves neither output, a selective one what its policy says."""

        def choose(ctx, op, *args, **kwargs):
            is_layer = op == torch.ops.aten.convolution.default
            return policy if is_layer else CheckpointPolicy.PREFER_RECOMPUTE

        def fn(x, *rest):
            contexts = functools.partial(create_selective_checkpoint_contexts, choose)
            more = {} if policy is None else {"context_fn": contexts}
            return checkpoint(lambda x: conv_bn(x, *rest).relu(), x, use_reentrant=False, **more)

        code = Code.FUSED if policy is None else Code.SAVED_ANYWAY
        recorder = check(fn, arguments(grad=("x",)), code)
        (record,) = [r for result in recorder.results for r in result.records if r.batch_norm]
        assert record.bytes_saved == 0
        assert record.detail == ("" if policy is None else "by a checkpoint's policy")

    def test_cond(self):
        def fn(x, *rest):
            return torch.cond(
                x.sum() > 0, lambda x: conv_bn(x, *rest), lambda x: conv_bn(x + 1, *rest), (x,)
            )

        check(fn, arguments(grad=("x",)), *[Code.INSIDE_HIGHER_ORDER_OP] * 2)

    def test_scan(self):
        def fn(x, *rest):
            return scan(lambda c, one: (c + 1, conv_bn(one, *rest)), x.sum()[None],
                        torch.stack([x, x + 1]))[1]  # fmt: skip

        check(fn, arguments(), Code.INSIDE_HIGHER_ORDER_OP)

    def test_scan_carry(self):
        def fn(x, *rest):
            return scan(lambda c, one: (conv_bn(c + one, *rest).relu(), one * 1), x,
                        torch.stack([x, x + 1]))[0]  # fmt: skip

        check(fn, carried(), Code.INSIDE_HIGHER_ORDER_OP)

    def test_map(self):
        def fn(x, w, *rest):
            return map_(lambda one, w: conv_bn(one, w, *rest), torch.stack([x, x + 1]), w)

        check(fn, arguments(), Code.INSIDE_HIGHER_ORDER_OP)

    def test_while_loop(self):
        """Without gradients, as these cannot be had through it."""

        def fn(x, *rest):
            def body(i, x):
                return i + 1, conv_bn(x, *rest).relu()

            return while_loop(lambda i, x: i < 3, body, (torch.zeros((), dtype=torch.int64), x))[1]

        check(fn, carried(frozen=PARAMETERS), Code.NO_GRAD)

    def test_nested_compile_region(self):
        def fn(x, *rest):
            return region(region(x, *rest), *rest)

        recorder = assert_same_as_unfused(fn, carried())
        found = {r.code for r in explain(fn, *carried()().values()).batch_norms}
        # Inlined, or, before, a graph that PyTorch partitions on its own.
        old = TorchVersion(torch.__version__) < "2.13"
        assert found == {Code.INSIDE_HIGHER_ORDER_OP if old else Code.FUSED}
        assert old or (recorder.fused and set(recorder.codes) == {Code.FUSED})

    def test_layer_outside_batch_norm_inside(self):
        def fn(x, w, b, *rest):
            c = F.conv2d(x, w, b)
            return checkpoint(lambda c: bn(c, *rest), c, use_reentrant=False)

        check(fn, arguments(), Code.FUSED)

    def test_operators_that_write_nothing(self):
        """A body that only reads the layer's operands is no write to them."""

        def fn(x, w, b, *rest):
            c = F.conv2d(x, w, b)
            u = checkpoint(lambda x: (x * w.sum() + b.sum()).sin(), x, use_reentrant=False)
            return bn(c, *rest) + u.sum()

        check(fn, arguments(), Code.FUSED)

    def test_written_in_a_body(self):
        def fn(x, w, b, *rest):
            def body(t):
                t.data.mul_(2)
                return t + 1

            c = F.conv2d(x, w, b)
            u = checkpoint(body, x, use_reentrant=False)
            return bn(c, *rest) + u.sum()

        recorder = assert_same_as_unfused(fn, arguments())
        assert not recorder.fused

    def test_pair_outside(self):
        """It is fused, and the body is as it was."""

        def fn(x, w, b, g, beta, m, v, *rest):
            y = conv_bn(x, w, b, g, beta, m, v).relu()
            return torch.cond(y.sum() > 0, lambda y: conv_bn(y, *rest), lambda y: y * 2, (y,))

        others = {name + "2": lambda made, name=name: made[name].detach() * 2 for name in "wbgmv"}
        others["beta2"] = lambda made: made["beta"].detach() - 1
        names = ("w2", "b2", "g2", "beta2", "m2", "v2")
        make = carried(**{name: others[name] for name in names})
        check(fn, make, Code.FUSED, Code.INSIDE_HIGHER_ORDER_OP)

    def test_pair_outside_of_the_same_parameters(self):
        def fn(x, *rest):
            y = conv_bn(x, *rest).relu()
            return torch.cond(y.sum() > 0, lambda y: conv_bn(y, *rest), lambda y: y * 2, (y,))

        check(fn, carried(), Code.FUSED, Code.INSIDE_HIGHER_ORDER_OP)
