"""Where the output channels of a weight are, and two operations along them.

    linear                weight [C_out, C_in]
    convolution           weight [C_out, C_in / groups, *kernel]
    transposed conv       weight [C_in, C_out / groups, *kernel]

In the transposed case with groups, output channel ``o`` of group ``q`` is column
``o - q * C_out / groups`` of the rows that belong to ``q``, so that the scale is a matrix rather
than a column. Nothing here knows of FX or autograd.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Layout(NamedTuple):
    """How a layer's output channels lie in its weight. The default is a linear layer's."""

    transposed: bool = False
    groups: int = 1


def views_onto_output_axis(
    weight_shape: Sequence[int], layout: Layout
) -> list[tuple[str, list[int]]]:
    """Views that lay a scale [C_out] out so that it broadcasts against a weight.

    Each is a name, "reshape" or "expand", and sizes: for tensors and for graphs alike.
    """
    kernel_dims = [1] * (len(weight_shape) - 2)
    if not layout.transposed:
        return [("reshape", [-1, 1, *kernel_dims])]
    if layout.groups == 1:
        return [("reshape", [1, -1, *kernel_dims])]
    rows, columns = weight_shape[:2]
    return [
        ("reshape", [layout.groups, 1, -1]),
        ("expand", [layout.groups, rows // layout.groups, columns]),
        ("reshape", [rows, columns, *kernel_dims]),
    ]


def output_padding(n: Any, m: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Any:
    """What a transposed convolution of ``m`` positions must add at the end to give ``n``.

    So its input gradient is written without the input. Sizes may be symbolic.
    """
    return n - ((m - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)


def scale_weight(weight: Tensor, scale: Tensor, layout: Layout) -> Tensor:
    """``s * W`` with ``s`` [C_out] on the output-channel axis of ``weight``.

    Shape and memory format are those of ``weight`` (a channels-last weight stays
    channels-last); the dtype follows type promotion of the two.
    """
    for view, sizes in views_onto_output_axis(weight.shape, layout):
        scale = getattr(scale, view)(sizes)
    return weight * scale


def channel_inner_product(a: Tensor, b: Tensor, layout: Layout) -> Tensor:
    """``<a, b>`` per output channel, shape [C_out], of two tensors laid out like a weight."""
    # Summed over the dimensions as they are: flattening them would fix the order in which
    # Inductor has to go through tensors whose layouts differ.
    product = a * b
    if not layout.transposed:
        return product.sum(list(range(1, product.ndim)))
    rows, columns, *kernel = product.shape
    by_group = product.reshape(layout.groups, rows // layout.groups, columns, *kernel)
    return by_group.sum([1, *range(3, by_group.ndim)]).flatten()
