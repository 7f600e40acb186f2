"""What the time of a layer and of what follows it depends on, as plain data.

Two layers with equal workloads take equally long: the key under which timings are kept.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from . import _compat
from .affine import AffineChain
from .aten_ir import CHANNELS_LAST, tensor_of, without_casts
from .epilogue import Activation, Residual

__all__ = ["TensorSpec", "Workload", "workload_of"]


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """What a tensor is like: hints of its sizes and strides, dtype, device."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str

    def make(self, dtype: torch.dtype | None = None) -> Tensor:
        out = torch.empty_strided(
            self.shape, self.stride, dtype=dtype or self.dtype, device=self.device
        )
        return out.fill_(0.5)  # no denormals, and no random numbers drawn


@dataclasses.dataclass(frozen=True)
class Workload:
    """A layer and what follows it, as far as it matters to the time: no nodes, no tensors.

    Attributes:
        target: the layer's operator.
        input, weight, output: its tensors, in the memory format that Inductor gives them.
        wide: dtype of the weight before autocast narrowed it.
        copies_weight: whether Inductor copies the weight into ``weight``'s memory format.
        bias, rest: whether it has a bias, and its other arguments.
        scales, shifts: what the affine chain does.
        activation: name, scalars and algorithm of the activation, if one follows.
        residual: "add" or "add+relu" if another tensor is added.
        ends: whether the result of all is written to memory, not taken over by another kernel.
        threads: that PyTorch computes with.
    """

    target: str
    input: TensorSpec
    weight: TensorSpec
    output: TensorSpec
    wide: torch.dtype
    copies_weight: bool
    bias: bool
    rest: tuple[Any, ...]
    scales: bool
    shifts: bool
    activation: tuple[str, tuple[float, ...], str] | None
    residual: str
    ends: bool
    threads: int


def workload_of(
    chain: AffineChain,
    activation: Activation | None,
    residual: Residual | None,
    ends: bool,
    *,
    is_channels_last: bool,
) -> Workload:
    """What to time for a layer, its affine chain and the epilogue that was recognised.

    ``is_channels_last`` says whether Inductor makes what goes through convolutions so.
    """
    layer = chain.layer
    x, w, out = tensor_of(layer.input), tensor_of(layer.weight), layer.out
    wide = tensor_of(without_casts(layer.weight))
    if x is None or w is None or wide is None:
        raise AssertionError(f"{layer.node} has no metadata")
    channels_last = is_channels_last and layer.is_conv
    weight = _like(w, channels_last=channels_last)
    return Workload(
        target=str(layer.node.target),
        input=_like(x, channels_last=channels_last),
        weight=weight,
        output=_like(out, channels_last=channels_last),
        wide=wide.dtype,
        copies_weight=_moves(weight, _like(w, channels_last=False)),
        bias=layer.bias is not None,
        rest=_numbers(layer.node.args[3:]) if layer.is_conv else (),
        scales=chain.scales,
        shifts=chain.shifts,
        activation=None
        if activation is None
        else (activation.name, activation.scalars, activation.algorithm),
        residual="" if residual is None else "add+relu" if residual.relu else "add",
        ends=ends,
        threads=torch.get_num_threads(),
    )


def _numbers(value: Any) -> Any:
    """Stride, padding and so on, hints where they are symbolic."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_numbers, value))
    return value if isinstance(value, bool) else _compat.size_hint(value)


def _like(tensor: Tensor, *, channels_last: bool) -> TensorSpec:
    shape = tuple(_compat.size_hint(s) for s in tensor.shape)
    stride = tuple(_compat.size_hint(s) for s in tensor.stride())
    # On GPUs, only what goes through 2-d convolutions.
    ranks = CHANNELS_LAST if tensor.device.type == "cpu" else (4,)
    if channels_last and tensor.ndim in ranks:
        with _compat.real_tensors():
            meta = torch.empty(shape, device="meta", memory_format=CHANNELS_LAST[tensor.ndim])
        stride = meta.stride()
    return TensorSpec(shape, stride, tensor.dtype, str(tensor.device))


def _moves(a: TensorSpec, b: TensorSpec) -> bool:
    """Whether the same numbers lie in another order in ``a`` and ``b``."""
    strides = [[s for size, s in zip(t.shape, t.stride, strict=True) if size != 1] for t in (a, b)]
    return strides[0] != strides[1]
