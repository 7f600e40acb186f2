"""``convolution_relu``: cuDNN's convolution with bias, residual and ReLU in one kernel.

PyTorch has it as ``aten::cudnn_convolution_relu`` and ``aten::cudnn_convolution_add_relu``, which
have no meta function, so that no graph can contain them. This one is written in Python; compiled
code that has to run without it must not contain it (``_torch.inductor.for_python``).
"""

from typing import Any

import torch
from torch import Tensor

from ..records import log

aten = torch.ops.aten

_library = torch.library.Library("convbn_inductor_pass", "FRAGMENT")
_library.define(
    "convolution_relu(Tensor input, Tensor weight, Tensor? bias, Tensor? other, int[] stride, "
    "int[] padding, int[] dilation, int groups) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


@torch.library.impl(_library, "convolution_relu", "CUDA")
def _convolution_relu(
    input: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, *geometry: Any
) -> Tensor:
    """``relu(conv(input, weight, bias) + other)``: [N, C_out, H, W], channels-last.

    ``input`` [N, C_in, H, W], ``weight`` [C_out, C_in / groups, kH, kW], both channels-last;
    ``bias`` [C_out]; ``other`` like the result. ``geometry``: stride, padding, dilation, groups.
    """
    try:
        if other is None:
            out = aten.cudnn_convolution_relu(input, weight, bias, *geometry)
        else:
            out = aten.cudnn_convolution_add_relu(input, weight, other, 1.0, bias, *geometry)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # cuDNN has no such kernel for these sizes
        log.debug("convolution_relu is computed by its parts: %s", error)
        return _by_parts(input, weight, bias, other, *geometry)
    # Where a dimension of one makes the memory format ambiguous, cuDNN may choose another.
    return out.contiguous(memory_format=torch.channels_last)


@torch.library.impl(_library, "convolution_relu", "CPU")
@torch.library.impl(_library, "convolution_relu", "Meta")
def _by_parts(
    input: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, *geometry: Any
) -> Tensor:
    """The same in three operators."""
    stride, padding, dilation, groups = geometry
    rest = (stride, padding, dilation, False, [0] * len(stride), groups)
    out = aten.convolution.default(input, weight, bias, *rest)
    out = aten.relu(out if other is None else out + other)
    return out.contiguous(memory_format=torch.channels_last)


convolution_relu = torch.ops.convbn_inductor_pass.convolution_relu.default
