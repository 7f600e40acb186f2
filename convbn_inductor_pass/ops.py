"""The package's own operator: oneDNN's linear layer with a post-op, for weights that change.

PyTorch has it as ``mkldnn::_linear_pointwise``, but Inductor lowers that only for weights that
``freezing`` has made constants. It takes a weight as it is, where oneDNN's convolution repacks it
in every call: a 1x1 convolution with a large weight is faster as a linear layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["linear_pointwise"]

_library = torch.library.Library("convbn_inductor_pass", "FRAGMENT")
_library.define(
    "linear_pointwise(Tensor input, Tensor weight, Tensor? bias, str attr, Scalar?[] scalars, "
    "str? algorithm) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def _linear_pointwise(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    attr: str,
    scalars: list[float | None],
    algorithm: str | None,
) -> Tensor:
    """``input`` [M, C_in], ``weight`` [C_out, C_in], ``bias`` [C_out]: [M, C_out], contiguous.

    ``attr``, ``scalars`` and ``algorithm`` name the activation as in ``mkldnn``'s operators.
    """
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, attr, scalars, algorithm)


def _linear_pointwise_meta(
    input: Tensor, weight: Tensor, bias: Tensor | None, *_post_op: object
) -> Tensor:
    return input.new_empty([input.shape[0], weight.shape[0]])


_library.impl("linear_pointwise", _linear_pointwise, "CPU")
_library.impl("linear_pointwise", _linear_pointwise_meta, "Meta")

linear_pointwise = torch.ops.convbn_inductor_pass.linear_pointwise.default
