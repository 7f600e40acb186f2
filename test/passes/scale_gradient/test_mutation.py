"""Writes between layer and batch norm, and later; aliases.

AOTAutograd has made all of them new tensors by the time the pass sees the graph, and what autograd
notices has raised.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same_as_unfused, compare, run
from programs import arguments, bf16, bn, check, conv_bn, written_function
from random_graphs import WRITES, WRITES_STATISTICS
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint

from convbn_inductor_pass import Code, testing

# Autograd notices these, and raises, with the pass and without.
NOTICED = ("{t}.mul_(0.5)", "detach()")


class TestBetween:
    @pytest.mark.parametrize("write", WRITES)
    def test_input(self, write):
        """Backward makes the weight's gradient from the input after the write, as eager mode."""
        codes = [] if any(word in write for word in NOTICED) else [Code.INPUT_MUTATED]
        check(written_function(write.format(t="x"), "between"), arguments(), *codes)

    @pytest.mark.parametrize("write", ["{t}.data.mul_(0.5)", "alias = {t}.data\nalias += 1"])
    @pytest.mark.parametrize("target", ["w", "b", "x[:, :1]", "w.view(-1)", "w.transpose(0, 1)"])
    def test_layer(self, target, write):
        check(written_function(write.format(t=target), "between"), arguments(), Code.INPUT_MUTATED)

    @pytest.mark.parametrize("where", ["between", "after"])
    def test_linear_weight(self, where):
        """What AOTAutograd writes to after the graph, backward must not read as it was before."""
        fn = written_function("w.data.mul_(0.5)", where, layer="linear")
        assert_same_as_unfused(fn, arguments(grad=("x",), x=(5, 3), w=(4, 3)))

    @pytest.mark.parametrize("write", WRITES_STATISTICS)
    def test_bias_as_statistics(self, write):
        """The bias of the layer is the running mean of another batch norm, in training mode."""
        written = written_function(write.format(t="b", c=4), "between")
        check(written, arguments(), Code.INPUT_MUTATED)

    @pytest.mark.parametrize(
        ("target", "code"),
        [
            ("g", Code.INPUT_MUTATED),
            ("beta", Code.FUSED),
            ("m", Code.INPUT_MUTATED),
            ("v", Code.INPUT_MUTATED),
        ],
    )
    def test_batch_norm(self, target, code):
        """What backward reads must not be written to; it does not read the shift."""
        check(written_function(f"{target}.data.mul_(0.5)", "between"), arguments(), code)

    @pytest.mark.parametrize("write", ["c.view(-1)[:3].zero_()", "c[0] = 1.0"])
    def test_part_of_layer_output(self, write):
        check(written_function(write, "between"), arguments(), Code.NOT_AFTER_LAYER)

    def test_layer_output_scaled(self):
        """A scaling in between: the sum over the layer's output is found all the same."""
        fn = written_function("c.mul_(2)", "between")
        check(fn, arguments(), Code.FUSED)

    def test_unrelated(self):
        fn = written_function("z.mul_(2)", "between", extra=", z")
        check(fn, arguments(z=(2, 3, 6, 6)), Code.FUSED)

    @pytest.mark.parametrize("write", [True, False])
    def test_custom_operator(self, write):
        """What an operator's schema says counts."""
        name = "scale_" if write else "scale"

        def fn(x, w, b, *rest):
            c = F.conv2d(x, w, b)
            u = getattr(torch.ops.convbn_test, name)(x.data)
            return bn(c, *rest) + u.sum()

        def scale(x):
            return x.mul_(2) if write else x * 2

        with torch.library._scoped_library("convbn_test", "FRAGMENT") as library:
            schema = "(Tensor(a!) x) -> Tensor(a!)" if write else "(Tensor x) -> Tensor"
            library.define(name + schema)
            library.impl(name, scale, "CompositeImplicitAutograd")
            check(fn, arguments(), Code.INPUT_MUTATED if write else Code.FUSED)

    def test_function_that_dynamo_does_not_trace(self):
        torch.compiler.allow_in_graph(opaque)

        def fn(x, w, b, *rest):
            c = F.conv2d(x, w, b)
            opaque(x.data)
            return bn(c, *rest)

        check(fn, arguments(), Code.INPUT_MUTATED)

    def test_storage_freed(self):
        """Backward raises, as without the pass."""

        def fn(x, w, b, *rest):
            c = F.conv2d(x, w, b)
            x.untyped_storage().resize_(0)
            return bn(c, *rest)

        check(fn, arguments(), Code.FUSED)


def opaque(x):
    return x.mul_(2)


class TestAliases:
    @pytest.mark.parametrize("how", ["view_as", "[:, :2]", "T"])
    def test_arguments_that_share_memory(self, how):
        alias = {
            "view_as": lambda made: made["x"].view(-1),
            "[:, :2]": lambda made: made["x"][:, :2],
            "T": lambda made: made["x"].permute(3, 2, 1, 0),
        }[how]
        fn = written_function("z.data.mul_(2)", "between", extra=", z")
        check(fn, arguments(z=alias), Code.INPUT_MUTATED)

    def test_through_an_operator(self):
        def fn(x, w, b, *rest):
            alias = checkpoint(lambda t: t.view(-1), x, use_reentrant=False)
            c = F.conv2d(x, w, b)
            alias.data.mul_(2)
            return bn(c, *rest)

        check(fn, arguments(), Code.INPUT_MUTATED)

    def test_through_idle_dropout(self):
        """Which copies, to the compiler; from torch 2.14 on it is an alias, as in eager mode."""

        def fn(x, w, b, *rest):
            alias = F.dropout(x, 0.5, training=False)
            c = F.conv2d(x, w, b)
            alias.data.mul_(2)
            return bn(c, *rest)

        copies = TorchVersion(torch.__version__) < "2.14"
        check(fn, arguments(), Code.FUSED if copies else Code.INPUT_MUTATED)

    def test_through_a_function(self):
        class View(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.view(-1)

            @staticmethod
            def backward(ctx, grad):
                return grad.view(2, 3, 6, 6)

        def fn(x, w, b, *rest):
            alias = View.apply(x)
            c = F.conv2d(x, w, b)
            alias.data.mul_(2)
            return bn(c, *rest)

        check(fn, arguments(), Code.INPUT_MUTATED)


class TestLater:
    @pytest.mark.parametrize(
        ("target", "seen"), [("x", None), ("w", None), ("b", Code.INPUT_MUTATED), ("g", None)]
    )
    def test_written(self, target, seen):
        """Behind autograd's back, and where it sees it and raises for what eager mode saves."""
        check(written_function(f"{target}.data.mul_(2)", "after"), arguments(), Code.INPUT_MUTATED)
        fn = written_function(f"with torch.no_grad(): {target}.mul_(2)", "after")
        check(fn, arguments(), *([] if seen is None else [seen]))

    def test_weight_under_autocast(self):
        """Eval mode saves the copy after the cast; writing to the weight is no error."""

        def fn(x, w, *rest):
            with bf16():
                y = conv_bn(x, w, *rest)
            w.data.mul_(2)
            return y

        check(fn, arguments(), Code.INPUT_MUTATED)

    def test_result(self):
        check(written_function("y.mul_(2)\ny += 1\nF.relu_(y)", "after"), arguments(), Code.FUSED)

    @pytest.mark.parametrize("write", ["c.mul_(2)", "c.view(-1)[:3].zero_()", "c[0] = 1.0"])
    def test_layer_output(self, write):
        """Raises, with the pass and without."""
        check(written_function(write, "after"), arguments())

    @pytest.mark.parametrize("target", ["x", "w", "g"])
    def test_version_counter(self, target):
        """A write after the call and before backward is still an error."""

        def call(fn, made):
            y = fn(*made.values())
            with torch.no_grad():
                made[target].add_(1)
            return y

        make = arguments(grad=("x",))
        check(conv_bn, make, Code.FUSED, call=call)
        fused = run(torch.compile(conv_bn, backend=testing.fast_backend()), make(), call)
        assert "modified by an inplace operation" in str(fused.error)

    @pytest.mark.parametrize("target", ["m", "b"])
    def test_version_counter_of_a_shift(self, target):
        """Eval mode does not save these; the gradient is that of before the write, or it raises."""

        def call(fn, made):
            y = fn(*made.values())
            with torch.no_grad():
                made[target].add_(1)
            return y

        make = arguments()
        fused = run(torch.compile(conv_bn, backend=testing.fast_backend()), make(), call)
        unfused = run(torch.compile(conv_bn, backend=testing.fast_backend(fuse=False)), make())
        eager = run(conv_bn, make())
        fused.state = unfused.state
        if fused.error is None:
            compare(fused, unfused, eager, eager)
        else:
            assert "modified by an inplace operation" in str(fused.error)
