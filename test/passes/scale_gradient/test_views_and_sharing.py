"""Views and casts in between, uses of the layer's output, shared layers and parameters."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from programs import (
    arguments,
    bn,
    carried,
    check,
    conv_bn,
)
from torch import nn

from convbn_inductor_pass import Code


class TestViewsAndSharing:
    """What is between a layer and the batch norm."""

    ROWS = (
        lambda c: c.flatten(0, 1),
        lambda c: c.view(-1, 4),
        lambda c: c.reshape(10, 4),
        lambda c: torch.flatten(c, end_dim=1),
        lambda c: F.dropout(c, 0.5, training=False).flatten(0, 1).contiguous(),
    )

    @pytest.mark.parametrize("i", range(len(ROWS)))
    def test_rows_of_a_linear(self, i):
        def fn(x, w, b, *rest):
            c = F.linear(x, w, b)
            return bn(self.ROWS[i](c), *rest).reshape_as(c)

        check(fn, arguments(grad=("x",), x=(2, 5, 3), w=(4, 3)), Code.FUSED)

    NO_OPS = (
        lambda c: F.dropout(c, 0.5, False),
        nn.Dropout2d(0.3).eval(),
        lambda c: c.contiguous(),
        lambda c: c.to(torch.float32),
        lambda c: c.float(),
        nn.Identity(),
    )

    @pytest.mark.parametrize("i", range(len(NO_OPS)))
    def test_no_ops(self, i):
        check(
            lambda x, w, b, *rest: bn(self.NO_OPS[i](F.conv2d(x, w, b)), *rest),
            arguments(),
            Code.FUSED,
        )

    IN_BETWEEN = (
        (lambda c: c.contiguous(memory_format=torch.channels_last), Code.FUSED),
        (lambda c: c.to(torch.float32, copy=True), Code.FUSED),
        (lambda c: c.transpose(2, 3), Code.FUSED),
        (lambda c: c.movedim(1, -1).movedim(-1, 1), Code.FUSED),
        (lambda c: c.flip(2), Code.NOT_AFTER_LAYER),
        (lambda c: c[:, [1, 0, 3, 2]], Code.NOT_AFTER_LAYER),
        (lambda c: c.to(torch.float64).float(), Code.UNSUPPORTED_DTYPE),
        (lambda c: c.detach(), Code.LAYER_FROZEN),  # the layer has no gradient
        (lambda c: c.relu(), Code.NOT_AFTER_LAYER),
        (lambda c: F.dropout(c, 0.5, True), Code.NOT_AFTER_LAYER),
    )

    @pytest.mark.parametrize("i", range(len(IN_BETWEEN)))
    def test_in_between(self, i):
        between, code = self.IN_BETWEEN[i]

        def fn(x, w, b, *rest):
            torch.manual_seed(0)
            return bn(between(F.conv2d(x, w, b)), *rest)

        check(fn, arguments(), code, exact=i < len(self.IN_BETWEEN) - 1)

    SHAPES = (
        lambda c: c.shape[0],
        lambda c: c.size(1) + c.dim() + c.numel(),
        lambda c: c.stride()[0],
    )

    @pytest.mark.parametrize("i", range(len(SHAPES)))
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_shape_of_layer_output(self, i, dynamic):
        def fn(x, w, b, *rest):
            c = F.conv2d(x, w, b)
            return bn(c, *rest) * self.SHAPES[i](c)

        check(fn, arguments(), Code.FUSED, dynamic=dynamic)


class TestSharing:
    """What else uses the layer's output, or the same layer, batch norm or parameters."""

    USES = (
        (lambda c, y: (y, c), Code.OTHER_GRADIENT),
        (lambda c, y: (y, c.detach()), Code.SAVED_ANYWAY),
        (lambda c, y: y + c, Code.OTHER_GRADIENT),
        (lambda c, y: y * c.detach(), Code.SAVED_ANYWAY),
        (lambda c, y: y.add_(c), Code.OTHER_GRADIENT),
        (lambda c, y: (y, c.view(-1)), Code.OTHER_GRADIENT),
    )

    @pytest.mark.parametrize("i", range(len(USES)))
    def test_layer_output_used(self, i):
        use, code = self.USES[i]

        def fn(x, w, b, *rest):
            c = F.conv2d(x, w, b)
            return use(c, bn(c, *rest))

        check(fn, arguments(), code)

    def test_layer_output_is_its_own_statistics(self):
        """[N, 4] with N = 4: the layer's output as weight of the batch norm as well."""

        def fn(x, w, b, g, beta, m, v):
            c = F.linear(x, w)
            return F.batch_norm(c, m, v, c.view(-1), beta)

        check(fn, arguments(x=(1, 3), w=(4, 3)), Code.OTHER_GRADIENT)

    def test_one_layer_two_batch_norms(self):
        def fn(x, w, b, g, beta, m, v):
            c = F.conv2d(x, w, b)
            return bn(c, g, beta, m, v) + bn(c, beta, g, m, v)

        check(fn, arguments(), Code.OTHER_GRADIENT, Code.OTHER_GRADIENT)

    def test_one_batch_norm_on_two_layers(self):
        def fn(x, w, b, *rest):
            return bn(F.conv2d(x, w, b), *rest) + bn(F.conv2d(x, w * 2), *rest)

        check(fn, arguments(grad=("x",)), Code.FUSED, Code.FUSED)

    def test_layer_called_twice(self):
        check(
            lambda x, *rest: conv_bn(conv_bn(x, *rest).relu(), *rest),
            carried(grad=("x",)),
            Code.FUSED,
            Code.FUSED,
        )

    def test_tied_parameters(self):
        """gamma is beta, and the bias, and a slice of the weight."""

        def fn(x, w, b, g, beta, m, v):
            return conv_bn(x, w, b, b, b, m, v) + conv_bn(x, w, None, w[:, 0, 0, 0], g, m, v)

        check(fn, arguments(grad=("x",)), Code.FUSED, Code.FUSED)

    def test_weight_is_input(self):
        check(
            lambda x, w, b, *rest: bn(F.conv2d(w, w, b), *rest),
            arguments(w=(4, 4, 1, 1)),
            Code.FUSED,
        )

    def test_interleaved(self):
        def fn(x, w, b, g, beta, m, v):
            c1 = F.conv2d(x, w, b)
            c2 = F.conv2d(x * 2, w, b)
            y1 = F.relu(bn(c1, g, beta, m, v), inplace=True)
            return bn(c2, g, beta, m, v) + y1

        check(fn, arguments(grad=("x",)), Code.FUSED, Code.FUSED)

    def test_two_batch_norms_in_a_row(self):
        check(
            lambda x, w, b, *rest: bn(bn(F.conv2d(x, w, b), *rest), *rest),
            arguments(),
            Code.FUSED,
            Code.FUSED,
        )
