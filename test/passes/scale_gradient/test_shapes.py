"""Sizes: empty, one, symbolic, dependent on data; memory formats; values that are not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import PassRecorder, run
from programs import (
    arguments,
    bn,
    check,
    conv_bn,
)

from convbn_inductor_pass import Code, options


class TestShapes:
    """Empty batches, batches of one, dynamic and unbacked sizes, channels_last."""

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_batch_of_one(self, dynamic):
        check(conv_bn, arguments(grad=("x",), x=(1, 3, 6, 6)), Code.FUSED, dynamic=dynamic)

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_empty_batch(self, dynamic):
        """PyTorch computes a product with one channel's weight then, which is another scale."""
        make = arguments(grad=("x",), x=(0, 3, 6, 6))
        assert check(conv_bn, make, dynamic=dynamic).fused == 1

    def test_empty_rows(self):
        recorder = check(
            lambda x, w, b, *rest: bn(F.linear(x, w, b).flatten(0, 1), *rest),
            arguments(grad=("x",), x=(0, 5, 3), w=(4, 3)),
        )
        assert recorder.fused == 1

    def test_sizes_that_change(self):
        """One compilation for all."""
        recorder = PassRecorder()
        compiled = torch.compile(conv_bn, backend=recorder, dynamic=True)
        for shape in ((2, 3, 6, 5), (3, 3, 9, 7), (5, 3, 8, 8)):
            make = arguments(grad=("x",), x=shape)
            expected, actual = run(conv_bn, make()), run(compiled, make())
            torch.testing.assert_close(actual.outputs, expected.outputs)
            torch.testing.assert_close(actual.gradients, expected.gradients, rtol=1e-4, atol=1e-4)
        assert recorder.codes == [Code.FUSED]

    def test_channels_that_are_symbolic(self):
        """A group's share of them is a size that no node gives."""

        def fn(x, w, b, *rest):
            return bn(F.conv_transpose2d(x, w, groups=2, padding=1), *rest)

        make = arguments(grad=("x",), x=(2, 8, 6, 6), w=(8, 2, 3, 3))
        check(fn, make, Code.FUSED, dynamic=True)

    def test_unbacked_sizes(self):
        """A size that depends on data has no number to count bytes with."""

        def fn(x, w, b, *rest):
            x = x[x.sum((1, 2)) > 0]
            torch._check(x.size(0) >= 2)
            return bn(F.linear(x, w, b).flatten(0, 1), *rest)

        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            for objective in ("memory", "speed"):
                with options(objective=objective):
                    check(fn, arguments(x=(16, 5, 3), w=(4, 3)), Code.FUSED)

    def test_stride_that_is_computed(self):
        def fn(x, w, b, *rest):
            return bn(F.conv2d(x, w, b, stride=x.shape[0]), *rest)

        check(fn, arguments(), Code.FUSED, dynamic=True)

    @pytest.mark.parametrize("weight_too", [False, True])
    def test_channels_last(self, weight_too):
        def last(made, name, shape):
            value = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            return value.to(memory_format=torch.channels_last).requires_grad_()

        changes: dict[str, Any] = {"x": lambda made: last(made, "x", (2, 4, 6, 6))}
        if weight_too:
            changes["w"] = lambda made: last(made, "w", (4, 4, 3, 3))
        check(conv_bn, arguments(**{"w": (4, 4, 3, 3), **changes}), Code.FUSED)

    def test_zero_variance_and_zero_gamma(self):
        check(
            conv_bn,
            arguments(
                v=lambda made: torch.zeros(4), g=lambda made: torch.zeros(4).requires_grad_()
            ),
            Code.FUSED,
        )

    def test_not_finite(self):
        """Not a number stays in its own output channel."""

        def weight(made):
            value = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(1))
            value[1] = float("nan")
            return value.requires_grad_()

        check(conv_bn, arguments(w=weight), Code.FUSED, exact=False)
