"""Dtypes, autocast and promotion; float16's range has a file of its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from programs import (
    arguments,
    bf16,
    bn,
    check,
    conv_bn,
    in_dtype,
)

from convbn_inductor_pass import Code


class TestDtypes:
    """Half-precision layers with float32 batch norms, autocast, promotion."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("names", ["x w b", "x w b g beta m v"])
    def test_dtypes(self, dtype, names):
        make = in_dtype(arguments(grad=("x",)), dtype, names)
        check(conv_bn, make, Code.FUSED)

    def test_autocast_inside(self):
        def fn(*args):
            with bf16():
                return conv_bn(*args).relu() + 1

        check(fn, arguments(grad=("x",)), Code.FUSED)

    def test_autocast_ambient(self):
        check(conv_bn, arguments(grad=("x",)), Code.FUSED, context=bf16)

    @pytest.mark.parametrize(
        "conv",
        [
            lambda x, w, b: torch.ops.aten.conv2d(x, w, b, padding="same"),
            lambda x, w, b: torch.convolution(x, w, b, (2, 2), (0, 1), (1, 1), False, (0, 0), 1),
        ],
        ids=["conv2d", "convolution"],
    )
    def test_autocast_of_spellings(self, conv):
        """Autocast casts for conv2d; torch.convolution it does not know and leaves in float32."""
        check(
            lambda x, w, b, *rest: bn(conv(x, w, b), *rest),
            arguments(grad=("x",)),
            Code.FUSED,
            context=bf16,
        )

    def test_autocast_ambient_and_off_inside(self):
        def fn(*args):
            with torch.autocast("cpu", enabled=False):
                return conv_bn(*args)

        check(fn, arguments(grad=("x",)), Code.FUSED, context=bf16)

    def test_autocast_float64(self):
        """Autocast leaves float64 alone."""
        check(
            conv_bn,
            in_dtype(arguments(), torch.float64, "x w b g beta m v"),
            Code.FUSED,
            context=bf16,
        )

    def test_autocast_linear(self):
        check(
            lambda x, w, b, *rest: bn(F.linear(x, w, b).flatten(0, 1), *rest),
            arguments(grad=("x",), x=(2, 5, 3), w=(4, 3)),
            Code.FUSED,
            context=bf16,
        )

    def test_autocast_weight_used_twice(self):
        def fn(x, w, b, *rest):
            return conv_bn(x, w, b, *rest) + conv_bn(x * 2, w, None, *rest)

        check(fn, arguments(grad=("x",)), Code.FUSED, Code.FUSED, context=bf16)
