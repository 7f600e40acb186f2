"""The calls that each way to compute a layer and what follows it makes, to be timed.

A way is a call of a library and a few generated kernels around it. The library's call is made
here as compiled code makes it, memory formats included. For a generated kernel stand pointwise
calls of eager mode on the same tensors, in place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import epilogue, fingerprint, kernels, ops
from .workload import Workload

__all__ = ["AS_WRITTEN", "Ways"]

aten = torch.ops.aten
AS_WRITTEN = "as written"


class Ways:
    """Tensors like a workload's, and a function for each way to compute it."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.x = workload.input.make()
        self.weight = workload.weight.make(workload.wide)
        if workload.copies_weight:
            self.weight = self.weight.contiguous()
        device, dtype = workload.output.device, workload.output.dtype
        self.vector = torch.full((workload.output.shape[1],), 0.5, dtype=dtype, device=device)
        # Output channels come second in a matrix product's and a transposed convolution's weight.
        sizes = [1] * self.weight.ndim
        axis = 1 if not workload.rest or workload.rest[3] else 0
        sizes[axis] = self.weight.shape[axis]
        self.scale = torch.full(sizes, 0.5, dtype=self.weight.dtype, device=device)
        # Made once: the memory allocator's moods are not what is to be compared.
        self.relaid = workload.weight.make()
        self.narrow_scale = self.scale.to(workload.weight.dtype)
        self.other = workload.output.make() if workload.residual else None
        if self.other is not None:
            self.rows = self.other.movedim(1, -1).reshape(-1, self.other.shape[1])

    def function(self, name: str) -> Callable[[], object]:
        return {
            AS_WRITTEN: self._as_written,
            kernels.ATEN: self._aten,
            kernels.ONEDNN: self._onednn,
            kernels.PACKED: self._packed,
            kernels.CUDNN: self._cudnn,
            kernels.LINEAR: self._linear,
            kernels.UNFOLDED_LINEAR: self._unfolded_linear,
        }[name]

    def _as_written(self) -> Tensor:
        w = self.workload
        weight = self._relaid() if w.copies_weight or w.wide != w.weight.dtype else self.weight
        return self._epilogue(self._layer(weight, self.vector if w.bias else None), affine=True)

    def _aten(self) -> Tensor:
        return self._epilogue(self._layer(self._scaled(), self._shift()), affine=False)

    def _onednn(self) -> Tensor:
        return self._with_post_ops(self._scaled(), self._shift())

    def _packed(self) -> Tensor:
        self._read()
        w = self.workload
        return self._with_post_ops(self._pack, self.vector if w.shifts or w.bias else None)

    @functools.cached_property
    def _read(self) -> Callable[[], object]:
        return fingerprint.reader(self.weight)

    @functools.cached_property
    def _pack(self) -> Tensor:
        w = self.workload
        stride, padding, dilation, *_, groups = w.rest
        weight = self.weight.to(w.weight.dtype)
        return ops.pack(weight, padding, stride, dilation, groups, w.input.shape)

    def _with_post_ops(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        w = self.workload
        stride, padding, dilation, *_, groups = w.rest
        name, scalars, algorithm = w.activation or ("none", (), "")
        geometry = (padding, stride, dilation, groups)
        mkldnn = torch.ops.mkldnn
        if self.other is None:
            return mkldnn._convolution_pointwise.default(
                self.x, weight, bias, *geometry, name, list(scalars), algorithm
            )
        relu = "relu" if w.residual == "add+relu" else None
        return mkldnn._convolution_pointwise_.binary(
            self.other, self.x, weight, bias, *geometry, "add", 1.0, relu, [], ""
        )

    def _cudnn(self) -> Tensor:
        stride, padding, dilation, *_, groups = self.workload.rest
        inputs = (self.x, self._scaled(), self._shift(), self.other)
        return ops.convolution_relu(*inputs, stride, padding, dilation, groups)

    def _linear(self) -> Tensor:
        post_op = self.workload.activation or ("none", (), "")
        out = self._linear_layer(self._scaled(), self._shift(), post_op)
        return out.add_(self.rows) if self.other is not None and self.workload.ends else out

    def _unfolded_linear(self) -> Tensor:
        w = self.workload
        weight = self._relaid() if w.wide != w.weight.dtype else self.weight
        out = self._linear_layer(weight, self.vector if w.bias else None, ("none", (), ""))
        return self._epilogue(out, affine=True)

    def _linear_layer(
        self, weight: Tensor, bias: Tensor | None, post_op: tuple[Any, ...]
    ) -> Tensor:
        name, scalars, algorithm = post_op
        weight = weight.reshape(weight.shape[0], -1) if self.workload.rest else weight.t()
        return ops.linear_pointwise(self._input(), weight, bias, name, list(scalars), algorithm)

    def _input(self) -> Tensor:
        """The input's rows: a view, or a copy where there is none, as with a stride."""
        if not self.workload.rest:
            return self.x
        return self._rows_of_x() if self._rows is None else self._rows

    @functools.cached_property
    def _rows(self) -> Tensor | None:
        # Views are made once: in eager mode they take a good part of a small product's time.
        rows = self._rows_of_x()
        return rows if rows.data_ptr() == self.x.data_ptr() else None

    def _rows_of_x(self) -> Tensor:
        x = self.x
        for dim, step in enumerate(self.workload.rest[0], 2):
            x = x[(slice(None),) * dim + (slice(None, None, step),)]
        return x.movedim(1, -1).reshape(-1, x.shape[1])

    def _layer(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.workload.rest:
            return aten.convolution.default(self.x, weight, bias, *self.workload.rest)
        if bias is None:
            return aten.mm.default(self.x, weight)
        return aten.addmm.default(bias, self.x, weight)

    def _relaid(self) -> Tensor:
        """The weight in the layer's dtype and memory format: one generated kernel."""
        if self.workload.wide != self.workload.weight.dtype:
            return self.relaid.copy_(self.weight)
        # Eager mode's copy between memory formats is several times slower than a generated one.
        return torch.mul(self.weight, 1.0, out=self.relaid)

    def _scaled(self) -> Tensor:
        """The same, and scaled."""
        w = self.workload
        if w.copies_weight or w.wide != w.weight.dtype:
            weight = self._relaid()
            return weight.mul_(self.narrow_scale) if w.scales else weight
        return torch.mul(self.weight, self.scale, out=self.relaid) if w.scales else self.weight

    def _shift(self) -> Tensor | None:
        w = self.workload
        return torch.add(self.vector, self.vector) if w.shifts else self.vector if w.bias else None

    def _epilogue(self, out: Tensor, *, affine: bool) -> Tensor:
        """What the layer's kernel does not compute, if a kernel of its own computes it."""
        w = self.workload
        if not w.ends:
            return out
        affine = affine and (w.scales or w.shifts)
        kernel: list[Callable[[], object]] = []
        if affine:
            v = self.vector if out.ndim == 2 else self.vector.view(-1, *[1] * (out.ndim - 2))
            kernel.append(lambda: torch.addcmul(v, out, v, out=out))
        if self.other is not None:
            other = self.other if out.ndim != 2 else self.rows
            kernel.append(lambda: out.add_(other))
        elif w.activation is not None:
            activation = epilogue.IN_PLACE[w.activation[0]]
            kernel.append(lambda: activation(out))
        # What adds up was measured on CPU only. Elsewhere the last call stands for the kernel.
        for call in kernel if out.device.type == "cpu" else kernel[-1:]:
            call()
        return out
