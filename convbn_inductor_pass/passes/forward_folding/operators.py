"""The package's own operators, for what Inductor cannot be told otherwise.

``convolution_relu``: cuDNN's convolution with bias, residual and ReLU in one kernel. PyTorch has
it as ``aten::cudnn_convolution_relu`` and ``aten::cudnn_convolution_add_relu``, whose results are
not known without computing them, so that no graph can contain them.

The others are for CPU only:

``linear_pointwise``: oneDNN's linear layer with a post-op, for weights that change. PyTorch has it
as ``mkldnn::_linear_pointwise``, but Inductor lowers that only for weights that ``freezing`` has
made constants. It takes a weight as it is, where oneDNN's convolution repacks it in every call: a
1x1 convolution with a large weight is faster as a linear layer.

``pack``: a weight in oneDNN's own layout. Its result is no plain tensor, which Inductor must not
see: it is in graphs only until :mod:`kept` takes it away.

``as_mask`` and ``as_bytes``: a copy of bytes that are 0 or 1 as a mask, and of a mask as bytes.
:mod:`masks` says why.

They are written in Python. Compiled code that has to run without it must not contain them:
``_inductor.for_python``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...graph.layers import CHANNELS_LAST

__all__ = ["as_bytes", "as_mask", "convolution_relu", "linear_pointwise", "pack"]

aten = torch.ops.aten
_library = torch.library.Library("convbn_inductor_pass", "DEF")
_library.define(
    "convolution_relu(Tensor input, Tensor weight, Tensor? bias, Tensor? other, int[] stride, "
    "int[] padding, int[] dilation, int groups) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_library.define(
    "linear_pointwise(Tensor input, Tensor weight, Tensor? bias, str attr, Scalar?[] scalars, "
    "str? algorithm) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_library.define(
    "pack(Tensor weight, int[] padding, int[] stride, int[] dilation, int groups, "
    "int[] input_size) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# "Flexible" keeps Inductor from bringing the argument into the layout that was traced.
_FLEXIBLE = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_library.define("as_mask(Tensor bytes) -> Tensor", tags=_FLEXIBLE)
_library.define("as_bytes(Tensor mask) -> Tensor", tags=_FLEXIBLE)


@torch.library.impl(_library, "convolution_relu", "CUDA")
def _convolution_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """``relu(conv(input, weight, bias) + other)``: [N, C_out, ...], channels-last.

    ``input`` [N, C_in, ...], ``weight`` [C_out, C_in / groups, ...], both channels-last; ``bias``
    [C_out]; ``other`` like the result. Raises RuntimeError where cuDNN has no such kernel.
    """
    geometry = (stride, padding, dilation, groups)
    if other is None:
        out = aten.cudnn_convolution_relu(input, weight, bias, *geometry)
    else:
        out = aten.cudnn_convolution_add_relu(input, weight, other, 1.0, bias, *geometry)
    # Where a dimension of one makes the memory format ambiguous, cuDNN's may be another.
    return out.contiguous(memory_format=CHANNELS_LAST[input.ndim])


@torch.library.impl(_library, "convolution_relu", "CPU")
@torch.library.impl(_library, "convolution_relu", "Meta")
def _convolution_relu_by_parts(
    input: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, *geometry: Any
) -> Tensor:
    """What the operator means, for machines without a GPU."""
    stride, padding, dilation, groups = geometry
    rest = (stride, padding, dilation, False, [0] * len(stride), groups)
    out = aten.convolution.default(input, weight, bias, *rest)
    out = aten.relu(out if other is None else out + other)
    return out.contiguous(memory_format=CHANNELS_LAST[input.ndim])


@torch.library.impl(_library, "linear_pointwise", "CPU")
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


@torch.library.impl(_library, "linear_pointwise", "Meta")
def _linear_pointwise_meta(
    input: Tensor, weight: Tensor, bias: Tensor | None, *_post_op: object
) -> Tensor:
    return input.new_empty([input.shape[0], weight.shape[0]])


@torch.library.impl(_library, "pack", "CPU")
def _pack(
    weight: Tensor,
    padding: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
    input_size: list[int],
) -> Tensor:
    """A convolution's weight in the layout that is fastest for an input of that size."""
    geometry = (padding, stride, dilation, groups, input_size)
    # With the detour it takes two thirds of the time that oneDNN takes from a contiguous weight.
    weight = weight.contiguous(memory_format=CHANNELS_LAST[weight.ndim])
    return torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry)


@torch.library.impl(_library, "pack", "Meta")
def _pack_meta(weight: Tensor, *_geometry: object) -> Tensor:
    return torch.empty_like(weight, memory_format=CHANNELS_LAST[weight.ndim])


@torch.library.impl(_library, "as_mask", "CPU")
def _as_mask(bytes: Tensor) -> Tensor:
    return bytes.view(torch.bool).clone()


@torch.library.impl(_library, "as_mask", "Meta")
def _as_mask_meta(bytes: Tensor) -> Tensor:
    return torch.empty_like(bytes, dtype=torch.bool)


@torch.library.impl(_library, "as_bytes", "CPU")
def _as_bytes(mask: Tensor) -> Tensor:
    return mask.view(torch.uint8).clone()


@torch.library.impl(_library, "as_bytes", "Meta")
def _as_bytes_meta(mask: Tensor) -> Tensor:
    return torch.empty_like(mask, dtype=torch.uint8)


convolution_relu = torch.ops.convbn_inductor_pass.convolution_relu.default
linear_pointwise = torch.ops.convbn_inductor_pass.linear_pointwise.default
pack = torch.ops.convbn_inductor_pass.pack.default
as_mask = torch.ops.convbn_inductor_pass.as_mask.default
as_bytes = torch.ops.convbn_inductor_pass.as_bytes.default
