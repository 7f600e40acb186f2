"""The package's own operators, for what Inductor cannot be told otherwise. On CPU only.

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

import torch
from torch import Tensor

from .aten_ir import CHANNELS_LAST

__all__ = ["as_bytes", "as_mask", "linear_pointwise", "pack"]

_library = torch.library.Library("convbn_inductor_pass", "DEF")
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


linear_pointwise = torch.ops.convbn_inductor_pass.linear_pointwise.default
pack = torch.ops.convbn_inductor_pass.pack.default
as_mask = torch.ops.convbn_inductor_pass.as_mask.default
as_bytes = torch.ops.convbn_inductor_pass.as_bytes.default
