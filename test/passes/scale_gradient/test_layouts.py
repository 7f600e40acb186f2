"""Where the output channels lie: in the weight, in the output, and in what is normalized."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from programs import (
    arguments,
    bn,
    check,
    conv_bn,
)

from convbn_inductor_pass import Code


class TestLayouts:
    """The scale lies on the output channels, whose axis differs by kind of layer."""

    @pytest.mark.parametrize("groups", [1, 2, 4])
    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_transposed(self, dims, groups):
        """Square weights: a scale on the wrong axis has the right shape."""
        conv = getattr(F, f"conv_transpose{dims}d")
        check(
            lambda x, w, b, *rest: bn(
                conv(x, w, b, stride=2, output_padding=1, groups=groups), *rest
            ),
            arguments(grad=("x",), x=(2, 4, *[3] * dims), w=(4, 4 // groups, *[2] * dims)),
            Code.FUSED,
        )

    def test_padding_same_of_even_kernels(self):
        """One more on the right than on the left."""
        check(
            lambda x, w, b, *rest: bn(F.conv2d(x, w, b, padding="same", dilation=(1, 3)), *rest),
            arguments(grad=("x",), x=(2, 3, 6, 5), w=(4, 3, 2, 4)),
            Code.FUSED,
        )

    @pytest.mark.parametrize("groups", [2, 4])
    def test_grouped_wider_than_input(self, groups):
        check(
            lambda x, w, b, *rest: bn(F.conv2d(x, w, b, groups=groups), *rest),
            arguments(
                grad=("x",),
                x=(2, 4, 5, 5),
                w=(8, 4 // groups, 3, 3),
                **dict.fromkeys(("b", "g", "beta", "m", "v"), (8,)),
            ),
            Code.FUSED,
        )


class TestRank:
    """Dimension 1, which a batch norm normalizes, is not always the layer's channels."""

    def test_unbatched_convolution(self):
        """conv2d of [3, 6, 6] gives [4, 4, 4]: dimension 1 is the height, and has 4 rows too."""
        fn = conv_bn
        check(fn, arguments(x=(3, 6, 6)), Code.UNBATCHED)

    def test_unbatched_then_unsqueezed_in_place(self):
        """The recorded input has its later shape, with a batch."""

        def fn(x, *rest):
            y = conv_bn(x, *rest)
            x.data.unsqueeze_(0)
            return y

        check(fn, arguments(x=(3, 6, 6)), Code.UNBATCHED)

    @pytest.mark.parametrize("shape", [(2, 4, 3), (2, 4, 5, 3)])
    def test_linear_of_many_dimensions(self, shape):
        check(
            lambda x, w, b, *rest: bn(F.linear(x, w, b), *rest),
            arguments(x=shape, w=(4, 3)),
            Code.UNBATCHED,
        )

    def test_linear_weight_of_one_dimension(self):
        check(
            lambda x, w, b, *rest: bn(F.linear(x, w), *rest),
            arguments(x=(5, 4, 3), w=(3,)),
            Code.NOT_AFTER_LAYER,
        )

    def test_rows_of_a_convolution(self):
        """[N, 4, 4].flatten(0, 1): the rows' length is that of the channels, by accident."""
        check(
            lambda x, w, b, *rest: bn(F.conv1d(x, w, b).flatten(0, 1), *rest),
            arguments(x=(2, 3, 6), w=(4, 3, 3)),
            Code.UNBATCHED,
        )

    def test_transposed_rows_of_a_linear(self):
        """The channels are where they belong again."""
        check(
            lambda x, w, b, *rest: bn(F.linear(x, w, b).transpose(1, 2), *rest),
            arguments(x=(2, 5, 3), w=(4, 3)),
            Code.FUSED,
        )

    @pytest.mark.parametrize(
        ("bias", "code"),
        [((1,), Code.FUSED), ((), Code.FUSED), ((5, 4), Code.NOT_AFTER_LAYER)],
        ids=str,
    )
    def test_linear_bias_that_broadcasts(self, bias, code):
        """One value for all channels is a bias; one for each element is an addition."""
        check(
            lambda x, w, b, *rest: bn(F.linear(x, w, b), *rest),
            arguments(x=(5, 3), w=(4, 3), b=bias),
            code,
        )
