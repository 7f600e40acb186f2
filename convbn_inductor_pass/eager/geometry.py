"""Stride, padding and the like of a convolution call, and the shape that comes of them.

What cannot be read is None: then the convolution runs at once, and complains if it must.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Geometry"]


class Geometry(NamedTuple):
    """What :func:`~convbn_inductor_pass.autograd.conv_bn_eval` takes beside tensors."""

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @classmethod
    def read(cls, bound: dict[str, Any], spatial: int, transposed: bool) -> Geometry | None:
        """From the arguments of a call by name; one number stands for all dimensions."""

        def expanded(name: str, default: int) -> Any:
            value = bound.get(name, default)
            values = (value,) if isinstance(value, int) else tuple(value)
            return values * spatial if len(values) == 1 else values

        padding = bound.get("padding", 0)
        if not isinstance(padding, str):
            padding = expanded("padding", 0)
        elif transposed or padding not in ("same", "valid"):
            return None
        geometry = cls(
            expanded("stride", 1),
            padding,
            expanded("dilation", 1),
            transposed,
            expanded("output_padding", 0),
            bound.get("groups", 1),
        )
        lists = (v for v in geometry if isinstance(v, tuple))
        if any(len(v) != spatial or not all(type(i) is int for i in v) for v in lists):
            return None
        return geometry if type(geometry.groups) is int and geometry.groups > 0 else None

    def output_shape(self, x: Tensor, weight: Tensor) -> tuple[int, ...] | None:
        """Shape of the result [N, C_out, *spatial]; None if the call is wrong or empty."""
        kernel = tuple(weight.shape[2:])
        if self.transposed:
            c_in, c_out = weight.shape[0], weight.shape[1] * self.groups
        else:
            c_in, c_out = weight.shape[1] * self.groups, weight.shape[0]
        if x.shape[1] != c_in or c_in % self.groups or c_out % self.groups or min(self.stride) < 1:
            return None
        if self.padding == "same":
            return (x.shape[0], c_out, *x.shape[2:]) if set(self.stride) == {1} else None
        padding = (0,) * len(kernel) if isinstance(self.padding, str) else self.padding
        if min(*padding, *self.dilation, *self.output_padding, 0) < 0:
            return None
        sizes = []
        for i, k in enumerate(kernel):
            reach = self.dilation[i] * (k - 1)
            if self.transposed:
                size = (x.shape[i + 2] - 1) * self.stride[i] - 2 * padding[i] + reach
                size += self.output_padding[i] + 1
            else:
                size = (x.shape[i + 2] + 2 * padding[i] - reach - 1) // self.stride[i] + 1
            sizes.append(size)
        return (x.shape[0], c_out, *sizes) if min(sizes) > 0 else None
