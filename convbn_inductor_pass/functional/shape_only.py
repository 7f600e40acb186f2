"""Calls whose backward reads of their input the shape alone, which autograd saves all the same.

A max-pooling's gradient goes where its indices say; a convolution or a batch norm with a frozen
weight needs its input for the gradient of that weight alone.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .._torch import eager as torch_eager

__all__ = ["saves_shape_only"]


def saves_shape_only(x: Tensor) -> saved_tensors_hooks:
    """Within, autograd saves of ``x``, and of what it is cast to, shape and strides alone.

    The gradients must not depend on the elements; what else is saved requires no gradient.
    """
    outer_pack, outer_unpack = torch_eager.saved_tensors_hooks() or (_itself, _itself)
    identity = id(x)  # autograd holds these functions, which must not hold ``x``

    def pack(t: Tensor) -> Any:
        if id(t) != identity and not t.requires_grad:
            return outer_pack(t)
        empty = functools.partial(torch.empty_strided, dtype=t.dtype, device=t.device)
        return functools.partial(empty, t.shape, t.stride())

    def unpack(packed: Any) -> Any:
        return packed() if isinstance(packed, functools.partial) else outer_unpack(packed)

    return saved_tensors_hooks(pack, unpack)


def _itself(t: Tensor) -> Tensor:
    return t
