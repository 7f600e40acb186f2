"""Where the output channels of a weight are, and two operations along them.

A per-channel scale ``s`` commutes with a convolution if it is laid out on the
weight's output-channel axis, and that axis differs by kind of layer:

    linear                weight [C_out, C_in]
    convolution           weight [C_out, C_in / groups, *kernel]
    transposed conv       weight [C_in, C_out / groups, *kernel]

In the transposed case with groups, output channel ``o`` of group ``q`` is column
``o - q * C_out / groups`` of the rows that belong to ``q``, so that the scale is a
matrix rather than a column. Everything that needs to know this is in this file;
nothing here knows of FX or autograd.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["channel_inner_product", "output_channels", "per_channel", "scale_weight"]


def output_channels(weight: Tensor, *, transposed: bool, groups: int) -> int:
    """Number of output channels of a conv or linear ``weight`` (layouts above)."""
    return weight.shape[1] * groups if transposed else weight.shape[0]


def per_channel(value: Tensor, ndim: int) -> Tensor:
    """View a ``[C]`` tensor as ``[1, C, 1, ...]`` with ``ndim`` dimensions."""
    return value.reshape([1, -1] + [1] * (ndim - 2))


def _on_output_axis(scale: Tensor, weight: Tensor, *, transposed: bool, groups: int) -> Tensor:
    """Lay ``scale`` [C_out] out so that it broadcasts against ``weight``."""
    kernel_dims = [1] * (weight.ndim - 2)
    if not transposed:
        return scale.reshape([-1, 1, *kernel_dims])
    if groups == 1:
        return scale.reshape([1, -1, *kernel_dims])
    rows_per_group = weight.shape[0] // groups
    matrix = scale.reshape(groups, 1, -1).expand(groups, rows_per_group, -1)
    return matrix.reshape([weight.shape[0], weight.shape[1], *kernel_dims])


def scale_weight(
    weight: Tensor, scale: Tensor, *, transposed: bool = False, groups: int = 1
) -> Tensor:
    """``s * W`` with ``s`` [C_out] on the output-channel axis of ``weight``.

    Shape and memory format are those of ``weight`` (a channels-last weight stays
    channels-last); the dtype follows type promotion of the two.
    """
    return weight * _on_output_axis(scale, weight, transposed=transposed, groups=groups)


def channel_inner_product(
    a: Tensor, b: Tensor, *, transposed: bool = False, groups: int = 1
) -> Tensor:
    """``<a, b>`` per output channel, shape [C_out], of two tensors laid out like a weight."""
    product = a * b
    if not transposed:
        return product.flatten(1).sum(1)
    rows, columns = product.shape[:2]
    return product.reshape(groups, rows // groups, columns, -1).sum((1, 3)).flatten()
