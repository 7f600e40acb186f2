"""Which batch norm takes which layer's output, and what else does, in one forward: for deploy mode.

Merging changes what a layer returns, so it has to be known that nothing but the batch norm sees it.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .calls import (
    BATCH_NORMS,
    LAYERS,
    VIEWS,
    BatchNormCall,
    LayerCall,
    runs_as_written,
    tensors_read,
)

__all__ = ["NormUse", "Observer"]


@dataclasses.dataclass(eq=False)
class LayerUse:
    """One call of a layer, and whether anything but one batch norm took its output."""

    weight: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    linear: bool
    used: bool = False


@dataclasses.dataclass(eq=False)
class NormUse:
    """One call of a batch norm, and of the layer that gave it its input."""

    mean: Tensor | None
    eps: float
    layer: LayerUse | None
    batch_statistics: bool


class Observer(TorchFunctionMode):
    """Notes the calls of layers and batch norms and who takes the layers' outputs.

    For a forward without graph, which would hold outputs, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norms: list[NormUse] = []
        self.layers: list[LayerUse] = []
        self._by_output: dict[int, tuple[Tensor, LayerUse]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if torch.compiler.is_compiling() or runs_as_written():
            return func(*args, **kwargs)
        if func in BATCH_NORMS and (bn := BatchNormCall.read(func, args, kwargs)):
            use = self._use_of(bn.input)
            if use is not None and any(n.layer is use for n in self.norms):
                use.used = True  # by two batch norms
            statistics = bn.training or bn.running_mean is None or bn.running_var is None
            self.norms.append(NormUse(bn.running_mean, bn.eps, use, statistics))
            return func(*args, **kwargs)
        uses = [u for t in tensors_read(func, args, kwargs) if (u := self._use_of(t))]
        output = func(*args, **kwargs)
        if uses and func in VIEWS and uses[0].linear and _are_rows(output, uses[0]):
            self._by_output[id(output)] = (output, uses[0])
            return output
        for use in uses:
            use.used = True
        if func in LAYERS and (call := LayerCall.read(func, args, kwargs)) is not None:
            use = LayerUse(call.weight, tuple(output.shape), output.dtype, call.conv is None)
            self.layers.append(use)
            self._by_output[id(output)] = (output, use)
        return output

    def _use_of(self, value: Any) -> LayerUse | None:
        return self._by_output.get(id(value), (None, None))[1]

    def end(self) -> None:
        """Outputs that outlive the forward were stored or returned."""
        references = [(weakref.ref(output), use) for output, use in self._by_output.values()]
        self._by_output.clear()
        for reference, use in references:
            use.used |= reference() is not None


def _are_rows(output: Tensor, use: LayerUse) -> bool:
    return output.ndim == 2 and output.shape[1] == use.shape[-1]
