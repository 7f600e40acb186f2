"""Calls of layers and batch norms in eager mode, read by name.

A layer's call is read only if it is on plain dense tensors and its arguments fit; anything else is
None and runs as written, so that errors are PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._torch import eager as torch_eager
from ..functional import Conv
from .geometry import pad_unevenly, read_conv

__all__ = ["BATCH_NORMS", "LAYERS", "MAX_POOLS", "RELUS", "SAVES_NOTHING", "VIEWS"]
__all__ += ["BatchNormCall", "LayerCall", "is_plain", "read_max_pool", "read_relu"]
__all__ += ["runs_as_written", "tensors_read"]

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = (*_CONV[:5], "output_padding", "groups", "dilation")
# Function -> names of its arguments, spatial dimensions (0: linear), whether it is transposed.
LAYERS: dict[Any, tuple[tuple[str, ...], int, bool]] = {
    torch.conv1d: (_CONV, 1, False),
    torch.conv2d: (_CONV, 2, False),
    torch.conv3d: (_CONV, 3, False),
    torch.conv_transpose1d: (_TRANSPOSED, 1, True),
    torch.conv_transpose2d: (_TRANSPOSED, 2, True),
    torch.conv_transpose3d: (_TRANSPOSED, 3, True),
    F.linear: (("input", "weight", "bias"), 0, False),
}
_AFFINE, _STATISTICS = ("weight", "bias"), ("running_mean", "running_var")
_MODE = ("training", "momentum", "eps")
BATCH_NORMS: dict[Any, tuple[str, ...]] = {
    F.batch_norm: ("input", *_STATISTICS, *_AFFINE, *_MODE),
    torch.batch_norm: ("input", *_AFFINE, *_STATISTICS, *_MODE, "cudnn_enabled"),
}
# Function -> whether it writes to its argument; None: if the argument "inplace" says so.
RELUS = {
    F.relu: None,
    **dict.fromkeys((torch.relu, Tensor.relu), False),
    **dict.fromkeys((torch.relu_, F.relu_, Tensor.relu_), True),
}
# Function -> spatial dimensions.
MAX_POOLS = {torch.max_pool2d: 2, F.max_pool2d: 2, torch.max_pool3d: 3, F.max_pool3d: 3}
_POOL = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
# Functions that save no argument that is an activation.
SAVES_NOTHING = {
    *(torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__),
    torch.cat,
}
# Questions that are no use of a tensor's elements.
_ATTRIBUTES = ("shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_cuda", "grad_fn")
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.stride, Tensor.is_contiguous),
    *(Tensor.numel, Tensor.nelement, Tensor.element_size),
    *(Tensor.is_floating_point, Tensor.is_complex, torch.is_floating_point, torch.is_complex),
    *(Tensor.__len__, torch.numel),
}
# What may make rows of a linear layer's output, for a batch norm to take.
VIEWS = {Tensor.flatten, torch.flatten, Tensor.reshape, torch.reshape, Tensor.view}
# ``y.view_as(c)`` asks for the shape of ``c``.
_SHAPE_OF_OTHER = {Tensor.reshape_as, Tensor.view_as, Tensor.expand_as}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_DEVICES = ("cpu", "cuda", "xpu", "mps", "meta")


def _bind(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Arguments by name; None if they do not fit, which torch is to complain about."""
    if len(args) > len(names) or (kwargs and not set(kwargs) <= set(names[len(args) :])):
        return None
    return {**dict(zip(names, args, strict=False)), **kwargs}


def is_plain(value: Any) -> bool:
    return (
        type(value) in _PLAIN
        and value.dtype in _FLOATS
        and value.layout is torch.strided
        and (value.is_cpu or value.device.type in _DEVICES)
        and not value.is_inference()
    )


class LayerCall(NamedTuple):
    """Arguments of a convolution (of a linear layer if ``conv`` is None)."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    conv: Conv | None

    @classmethod
    def read(cls, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerCall | None:
        """The call as it computes, after autocast and padding; None if it is to run as written."""
        names, spatial, _ = LAYERS[function]
        bound = _bind(names, args, kwargs)
        if bound is None or not {"input", "weight"} <= bound.keys():
            return None
        x, weight, bias = bound["input"], bound["weight"], bound.get("bias")
        if not (is_plain(x) and is_plain(weight) and (bias is None or is_plain(bias))):
            return None
        if x.device != weight.device:
            return None
        dtype, autocast = x.dtype, _autocast_dtype(x.device.type)
        dtypes = {dtype, weight.dtype} if bias is None else {dtype, weight.dtype, bias.dtype}
        if autocast is None or dtype == torch.float64:
            if len(dtypes) > 1:
                return None
        elif torch.float64 in dtypes:
            return None
        else:
            dtype = autocast
        conv = None
        if spatial == 0:
            if x.ndim < 2 or weight.ndim != 2:
                return None
            if x.ndim > 2 and not x.is_contiguous():
                if bias is not None:  # computed in another way, with other bits
                    return None
                x = x.contiguous()  # as autograd saves it
        else:
            if x.ndim != spatial + 2 or weight.ndim != spatial + 2:
                return None
            if (conv := _read_conv(function, args, kwargs, bound)) is None:
                return None
            if bound.get("padding") == "same":
                x = pad_unevenly(x, weight, conv.dilation)
        return cls(x if x.dtype == dtype else x.to(dtype), weight, bias, conv)


_known: dict[Any, Conv] = {}


def _read_conv(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], bound: dict[str, Any]
) -> Conv | None:
    """:func:`read_conv`, remembered for the calls that modules make, whose arguments are tuples."""
    key: Any = (function, args[3:])
    if not kwargs and len(args) == 7 and type(args[3]) is type(args[4]) is type(args[5]) is tuple:
        if (known := _known.get(key)) is not None:
            return known
    else:
        key = None
    _, spatial, transposed = LAYERS[function]
    conv = read_conv(bound, spatial, transposed)
    if key is not None and conv is not None:
        _known[key] = conv
    return conv


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    # The meta device, for one, knows no autocast and raises when asked for it.
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


_NEEDED = {"input", "running_mean", "running_var"}


class BatchNormCall(NamedTuple):
    """Arguments of a batch norm by name."""

    input: Any
    running_mean: Any
    running_var: Any
    weight: Any = None
    bias: Any = None
    training: bool = False
    eps: float = 1e-5

    @classmethod
    def read(
        cls, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BatchNormCall | None:
        bound = _bind(BATCH_NORMS[function], args, kwargs)
        if bound is None or not bound.keys() >= _NEEDED:
            return None
        if not isinstance(bound["input"], Tensor) or bound["input"].ndim < 2:
            return None
        bound.pop("momentum", None)
        bound.pop("cudnn_enabled", None)
        return cls(**bound)

    @property
    def wants_gradient(self) -> bool:
        """Whether a graph is recorded."""
        w, b = self.weight, self.bias
        return torch.is_grad_enabled() and (
            self.input.requires_grad
            or (w is not None and w.requires_grad)
            or (b is not None and b.requires_grad)
        )


def read_relu(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, bool] | None:
    """A ReLU's input, and whether the result is written to it; None if it is to run as written."""
    bound = _bind(("input", "inplace"), args, kwargs)
    if bound is None or "input" not in bound:
        return None
    x, inplace = bound["input"], RELUS[function]
    inplace = bool(bound.get("inplace")) if inplace is None else inplace
    if not (torch.is_grad_enabled() and is_plain(x) and x.requires_grad):
        return None
    # Errors about what must not be written to are PyTorch's own.
    return None if inplace and (x._is_view() or x.is_leaf) else (x, inplace)


def read_max_pool(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...] | None:
    """Arguments of :func:`functional.max_pool`; None if it is to run as written."""
    bound, spatial = _bind(_POOL, args, kwargs), MAX_POOLS[function]
    if bound is None or not {"input", "kernel_size"} <= bound.keys() or bound.get("return_indices"):
        return None
    x = bound["input"]
    if not (torch.is_grad_enabled() and is_plain(x) and x.requires_grad and x.ndim == spatial + 2):
        return None
    if spatial == 3 and _autocast_dtype(x.device.type) is not None:  # which may cast it
        return None
    kernel, stride = bound["kernel_size"], bound.get("stride")
    stride = kernel if stride is None else stride
    sizes = (kernel, stride, bound.get("padding", 0), bound.get("dilation", 1))
    lists = [(v,) * spatial if type(v) is int else v for v in sizes]
    plain = all(type(v) in (list, tuple) and len(v) == spatial for v in lists)
    ceil_mode = bound.get("ceil_mode", False)
    if (
        not plain
        or type(ceil_mode) is not bool
        or any(type(i) is not int for v in lists for i in v)
    ):
        return None
    return (x, *lists, ceil_mode)


def tensors_read(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Tensors among the arguments, and in lists there, more of which than metadata is asked for."""
    if function not in _METADATA:
        yield from _tensors(args[:1] if function in _SHAPE_OF_OTHER else (*args, *kwargs.values()))


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def runs_as_written() -> bool:
    """Whether what goes on around a call has no use for functions of our own, or no place."""
    return (
        torch.is_inference_mode_enabled()
        or torch_eager.in_functional_transform()
        or torch_eager.is_tracing()
    )
