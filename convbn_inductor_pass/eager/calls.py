"""Calls of torch functions in eager mode: what they are, and what they do with a tensor."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = {
    *(torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    F.linear,
}
RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
MAX_POOLS = {torch.max_pool2d, F.max_pool2d, torch.max_pool3d, F.max_pool3d}
# Functions that save no argument that is an activation.
SAVES_NOTHING = {
    *(torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__),
    *MAX_POOLS,  # in a region
    torch.cat,
}
# Questions that are no use of a tensor's elements.
_ATTRIBUTES = ("shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_cuda")
METADATA = {
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.stride, Tensor.is_contiguous),
    *(Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.__len__, torch.numel),
    *(Tensor.is_floating_point, Tensor.is_complex, torch.is_floating_point, torch.is_complex),
}
# What may make rows of a linear layer's output, for a batch norm to take.
VIEWS = {Tensor.flatten, torch.flatten, Tensor.reshape, torch.reshape, Tensor.view}
_PLAIN_TYPES = (Tensor, nn.Parameter, nn.Buffer)
# ``y.view_as(c)`` asks for the shape of ``c``.
_SHAPE_OF_OTHER = {Tensor.reshape_as, Tensor.view_as, Tensor.expand_as}


def is_plain(value: Any) -> bool:
    return (
        type(value) in _PLAIN_TYPES
        and value.layout is torch.strided
        and value.is_floating_point()
        and not value.is_inference()
    )


def layer_tensors(
    input: Any, weight: Any, bias: Any = None, *_: Any, **__: Any
) -> tuple[Any, Any, Any]:
    """Input, weight and bias, of the arguments of any convolution or linear layer."""
    return input, weight, bias


class BatchNormCall(NamedTuple):
    """Arguments of ``F.batch_norm``."""

    input: Any
    running_mean: Any
    running_var: Any
    weight: Any = None
    bias: Any = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5

    @property
    def batch_statistics(self) -> bool:
        return self.training or self.running_mean is None or self.running_var is None


def tensors_read(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Tensors among the arguments, and in lists there, of which more than metadata is read."""
    if function not in METADATA:
        yield from _tensors(args[:1] if function in _SHAPE_OF_OTHER else (*args, *kwargs.values()))


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
