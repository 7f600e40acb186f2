"""Every spelling of the same layer and batch norm is the same to the pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from programs import (
    arguments,
    bn,
    check,
)

from convbn_inductor_pass import Code


class TestArguments:
    """Keywords, defaults, ``input=``, string padding, overload packets."""

    CONVS = (
        lambda x, w, b: F.conv2d(x, w, b),
        lambda x, w, b: F.conv2d(input=x, bias=b, weight=w, stride=2),
        lambda x, w, b: torch.conv2d(x, w, b, (1, 2), 1, (1, 2), 1),
        lambda x, w, b: F.conv2d(x, w, b, padding="same"),
        lambda x, w, b: F.conv2d(x, w, b, (2, 1), "valid"),
        lambda x, w, b: F.conv2d(x, w, padding=[1]),
        lambda x, w, b: torch.ops.aten.conv2d(x, w, b),
        lambda x, w, b: torch.ops.aten.conv2d.default(x, w, None, [1, 1], [1, 0]),
        lambda x, w, b: torch.ops.aten.conv2d.padding(x, w, b, padding="same"),
        lambda x, w, b: torch.ops.aten.convolution.default(
            x, w, b, [1], [1], [1], False, [0, 0], 1
        ),
        lambda x, w, b: torch.convolution(x, w, b, (2, 2), (0, 1), (1, 1), False, (0, 0), 1),
    )
    BATCH_NORMS = (
        lambda c, g, beta, m, v: F.batch_norm(c, m, v),
        lambda c, g, beta, m, v: F.batch_norm(c, m, v, g, beta, False, 0.3, 0.1),
        lambda c, g, beta, m, v: F.batch_norm(
            running_var=v, running_mean=m, input=c, weight=g, eps=1e-2
        ),
        lambda c, g, beta, m, v: torch.batch_norm(c, g, beta, m, v, False, 0.1, 1e-5, True),
        lambda c, g, beta, m, v: torch.ops.aten.batch_norm(
            c, g, beta, m, v, False, 0.1, 1e-5, False
        ),
        lambda c, g, beta, m, v: torch.ops.aten.batch_norm.default(
            c, g, None, m, v, training=False, momentum=0.1, eps=1e-5, cudnn_enabled=False
        ),
        lambda c, g, beta, m, v: torch.native_batch_norm(c, g, beta, m, v, False, 0.1, 1e-5)[0],
        lambda c, g, beta, m, v: torch.ops.aten.native_batch_norm.default(
            c, g, beta, m, v, False, 0.1, 1e-5
        )[0],
        lambda c, g, beta, m, v: torch.ops.aten._native_batch_norm_legit_no_training.default(
            c, g, beta, m, v, 0.1, 1e-5
        )[0],
    )

    @pytest.mark.parametrize("i", range(len(CONVS)))
    def test_layer(self, i):
        conv = self.CONVS[i]
        check(lambda x, w, b, *rest: bn(conv(x, w, b), *rest), arguments(), Code.FUSED)

    @pytest.mark.parametrize("i", range(len(BATCH_NORMS)))
    def test_batch_norm(self, i):
        norm = self.BATCH_NORMS[i]
        code = Code.FUSED if i else Code.AFFINE_FROZEN
        check(lambda x, w, b, *rest: norm(F.conv2d(x, w, b), *rest), arguments(), code)

    def test_linear_keywords(self):
        check(
            lambda x, w, b, *rest: bn(F.linear(bias=b, input=x, weight=w), *rest),
            arguments(x=(5, 3), w=(4, 3)),
            Code.FUSED,
        )

    def test_statistics_used(self):
        """Of native_batch_norm, whose other outputs are empty in eval mode."""

        def fn(x, w, b, g, beta, m, v):
            y, mean, _ = torch.native_batch_norm(F.conv2d(x, w, b), g, beta, m, v, False, 0.1, 1e-5)
            return y, mean

        check(fn, arguments(), Code.FUSED)
