"""Stride, padding and the like of a convolution call.

What cannot be read is None: then the convolution runs as written, and complains if it must.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..functional import Conv

__all__ = ["pad_unevenly", "read_conv"]


def read_conv(bound: dict[str, Any], spatial: int, transposed: bool) -> Conv | None:
    """From the arguments of a call by name; one integer stands for all dimensions.

    ``padding="same"`` is half of what it adds, rounded down: see :func:`pad_unevenly`.
    """

    def expanded(name: str, default: int) -> Any:
        value = bound.get(name, default)
        values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        return values * spatial if len(values) == 1 else values

    stride, dilation = expanded("stride", 1), expanded("dilation", 1)
    padding = bound.get("padding", 0)
    if not isinstance(padding, str):
        padding = expanded("padding", 0)
    elif transposed or padding not in ("same", "valid") or len(dilation) != spatial:
        return None
    elif padding == "valid":
        padding = (0,) * spatial
    elif set(stride) == {1} and all(type(d) is int for d in dilation):
        padding = tuple(total // 2 for total in _same_padding(bound["weight"], dilation))
    else:
        return None
    groups = bound.get("groups", 1)
    conv = Conv(stride, padding, dilation, transposed, expanded("output_padding", 0), groups)
    lists = (v for v in conv if isinstance(v, tuple))
    if any(len(v) != spatial or not all(type(i) is int for i in v) for v in lists):
        return None
    return conv if type(groups) is int and groups > 0 else None


def pad_unevenly(x: Tensor, weight: Tensor, dilation: tuple[int, ...]) -> Tensor:
    """``x`` with the one more on the right that ``padding="same"`` adds for an even kernel.

    ``aten::conv2d.padding`` pads first, too, and saves the padded input for backward.
    """
    extra = [total % 2 for total in _same_padding(weight, dilation)]
    return F.pad(x, [n for e in reversed(extra) for n in (0, e)]) if any(extra) else x


def _same_padding(weight: Tensor, dilation: tuple[int, ...]) -> list[int]:
    return [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
