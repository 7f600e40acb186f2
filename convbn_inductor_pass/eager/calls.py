"""Calls of layers and batch norms in eager mode, read by name, to be made later or not at all.

A call is read only if it is on plain dense tensors and its arguments fit; anything else is None
and runs at once, so that errors are PyTorch's own and come where they always came.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._torch import eager as torch_eager
from ..codes import Code
from ..functional import Conv
from .geometry import output_shape, pad_unevenly, read_conv

if TYPE_CHECKING:
    import weakref

    from .deferred import Deferred

__all__ = ["BATCH_NORMS", "LAYERS", "BatchNormCall", "Context", "LayerCall", "is_plain"]

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
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_DEVICES = ("cpu", "cuda", "xpu", "mps", "meta")


def _bind(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """Arguments by name; None if they do not fit, which torch is to complain about."""
    if len(args) > len(names) or not set(kwargs) <= set(names[len(args) :]):
        return None
    return {**dict(zip(names, args, strict=False)), **kwargs}


class Context(NamedTuple):
    """What the world around a call may change about it."""

    grad_enabled: bool
    autocast: bool
    autocast_dtype: torch.dtype
    hooks: tuple[Any, Any] | None

    @classmethod
    def now(cls, device_type: str) -> Context:
        on, dtype = False, torch.float32
        # The meta device, for one, knows no autocast and raises when asked for it.
        if torch.amp.is_autocast_available(device_type):
            on = torch.is_autocast_enabled(device_type)
            dtype = torch.get_autocast_dtype(device_type)
        return cls(torch.is_grad_enabled(), on, dtype, torch_eager.saved_tensors_hooks())

    @contextlib.contextmanager
    def restored(self, device_type: str) -> Iterator[None]:
        now = Context.now(device_type)
        with contextlib.ExitStack() as stack:
            if self.grad_enabled != now.grad_enabled:
                stack.enter_context(torch.set_grad_enabled(self.grad_enabled))
            if self[1:3] != now[1:3]:
                autocast = torch.autocast(device_type, self.autocast_dtype, enabled=self.autocast)
                stack.enter_context(autocast)
            if self.hooks != now.hooks:
                pack, unpack = self.hooks or (lambda t: t, lambda t: t)
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, unpack))
            yield


@dataclasses.dataclass(eq=False)
class LayerCall:
    """A call of a convolution or linear layer, and all that is needed to make it later.

    ``conv`` is None for a linear layer; ``shape`` and ``dtype`` are the output's. ``live``
    collects references to the :class:`Deferred` made of it; ``on_use`` is told why the
    convolution had to run after all; ``event`` is the interception's note about the call.
    """

    function: Callable[..., Tensor]
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    conv: Conv | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    context: Context
    live: list[weakref.ref[Deferred]] = dataclasses.field(default_factory=list)
    on_use: Callable[[Code], None] = lambda code: None
    event: Any = None
    versions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.versions = self._versions()

    def _versions(self) -> tuple[int, ...]:
        return tuple(0 if t is None else t._version for t in self.operands)

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        return (self.input, self.weight, self.bias)

    @property
    def device_type(self) -> str:
        return self.input.device.type

    @property
    def needs_grad(self) -> bool:
        return self.context.grad_enabled and any(
            t is not None and t.requires_grad for t in self.operands
        )

    @property
    def is_modified(self) -> bool:
        """Whether an operand was written to since the call."""
        return self.versions != self._versions()

    def check_unmodified(self) -> None:
        if self.is_modified:
            raise RuntimeError(
                "the input, weight or bias of a convolution was modified in place between the "
                "convolution and the first use of its output, in a way that tune mode does not "
                "see (an autograd.Function, or other code than PyTorch's). Turn tune mode on "
                "for other parts of the model only: turn_on(model, modules=[...])"
            )

    def run(self) -> Tensor:
        """Make the call as it was written."""
        self.check_unmodified()
        args: list[Any] = [self.input, self.weight, self.bias]
        if (c := self.conv) is not None:
            rest = (
                (c.output_padding, c.groups, c.dilation) if c.transposed else (c.dilation, c.groups)
            )
            args += [c.stride, c.padding, *rest]
        with torch_eager.torch_functions_off(), self.context.restored(self.device_type):
            return self.function(*args)

    def run_below_autograd(self) -> Tensor:
        """The same output, where autocast no longer makes its casts for us."""
        self.check_unmodified()
        operands = (None if t is None else t.detach().to(self.dtype) for t in self.operands)
        context = Context(False, False, self.context.autocast_dtype, None)
        return self.on(*operands, context=context).run()

    def on(self, x: Any, weight: Any, bias: Any, **changes: Any) -> LayerCall:
        """The same call on other operands."""
        return dataclasses.replace(self, input=x, weight=weight, bias=bias, **changes)

    @classmethod
    def read(cls, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerCall | None:
        """The call, or None if it must run at once: it is odd, wrong, or not on plain tensors."""
        names, spatial, transposed = LAYERS[function]
        bound = _bind(names, args, kwargs)
        if bound is None or not {"input", "weight"} <= bound.keys():
            return None
        x, weight, bias = bound["input"], bound["weight"], bound.get("bias")
        tensors = [x, weight] if bias is None else [x, weight, bias]
        if not all(is_plain(t) and t.device == x.device for t in tensors):
            return None
        context, dtype = Context.now(x.device.type), x.dtype
        shape: tuple[int, ...] | None
        if context.autocast and dtype != torch.float64:
            dtype = context.autocast_dtype
            if any(t.dtype == torch.float64 for t in tensors):
                return None
        elif any(t.dtype != dtype for t in tensors):
            return None
        if spatial == 0:
            if x.ndim < 2 or weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
                return None
            conv, shape = None, (*x.shape[:-1], weight.shape[0])
        else:
            if x.ndim != spatial + 2 or weight.ndim != spatial + 2:
                return None
            if (conv := read_conv(bound, spatial, transposed)) is None:
                return None
            if bound.get("padding") == "same":
                with torch_eager.torch_functions_off():
                    x = pad_unevenly(x, weight, conv.dilation)
            if (shape := output_shape(conv, x, weight)) is None:
                return None
        if bias is not None and tuple(bias.shape) != (shape[1 if spatial else -1],):
            return None
        return cls(function, x, weight, bias, conv, shape, dtype, context)


def is_plain(value: Any) -> bool:
    return (
        type(value) in _PLAIN
        and value.dtype in _FLOATS
        and value.layout == torch.strided
        and value.device.type in _DEVICES
        and not value.is_inference()
    )


class BatchNormCall(NamedTuple):
    """Arguments of a batch norm by name."""

    input: Any
    running_mean: Any
    running_var: Any
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    eps: float = 1e-5

    @classmethod
    def read(
        cls, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BatchNormCall | None:
        bound = _bind(BATCH_NORMS[function], args, kwargs)
        if bound is None or not {"input", "running_mean", "running_var"} <= bound.keys():
            return None
        return cls(**{name: bound[name] for name in cls._fields if name in bound})
