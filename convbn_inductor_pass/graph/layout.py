"""Where the output channels of a weight are, and two operations along them.

    linear                weight [C_out, C_in]
    convolution           weight [C_out, C_in / groups, *kernel]
    transposed conv       weight [C_in, C_out / groups, *kernel]

In the transposed case with groups, output channel ``o`` of group ``q`` is column ``o - q * C_out /
groups`` of the rows that belong to ``q``: the scale is a matrix. Nothing here knows of FX.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Layout(NamedTuple):
    """How a layer's output channels lie in its weight. The default is a linear layer's."""

    transposed: bool = False
    groups: int = 1


def onto_output_axis(
    weight_shape: Sequence[Any], layout: Layout
) -> tuple[list[Any] | None, list[Any]]:
    """Sizes in which a weight and a scale [C_out] broadcast along the output channels.

    None for a weight as it is. For tensors and for graphs alike; sizes may be symbolic.
    """
    ones = [1] * (len(weight_shape) - 2)
    if not layout.transposed:
        return None, [-1, 1, *ones]
    if layout.groups == 1:
        return None, [1, -1, *ones]
    by_group = [layout.groups, -1, *weight_shape[1:]]
    return by_group, [layout.groups, 1, weight_shape[1], *ones]


def along_output_channels(values: Tensor, weight_shape: Sequence[int], layout: Layout) -> Tensor:
    """``values`` [C_out] in a shape that broadcasts with a weight."""
    by_group, sizes = onto_output_axis(weight_shape, layout)
    values = values.reshape(sizes)
    if by_group is None:
        return values
    rows = weight_shape[0] // layout.groups
    return values.expand(-1, rows, *values.shape[2:]).reshape(-1, *values.shape[2:])


def scale_weight(weight: Tensor, scale: Tensor, layout: Layout) -> Tensor:
    """``s * W`` with ``s`` [C_out] on the output-channel axis of ``weight``.

    Shape and memory format are those of ``weight``; the dtype follows type promotion of the two.
    """
    return weight * along_output_channels(scale, weight.shape, layout)


def channel_inner_product(a: Tensor, b: Tensor, layout: Layout) -> Tensor:
    """``<a, b>`` per output channel, shape [C_out], of two tensors laid out like a weight."""
    # Summed over the dimensions as they are: flattening them would fix the order in which
    # Inductor has to go through tensors whose layouts differ.
    product = a * b
    if not layout.transposed:
        return product.sum(list(range(1, product.ndim)))
    by_group = product.reshape(layout.groups, -1, *product.shape[1:])
    return by_group.sum([1, *range(3, by_group.ndim)]).reshape(-1)
