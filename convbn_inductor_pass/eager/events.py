"""What is noted of the calls in a forward, for :mod:`decide` and for the next forward."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn

from .._torch import eager as torch_eager
from ..codes import Code
from .calls import SAVES_NOTHING, VIEWS, LayerCall

__all__ = ["Event", "Ledger"]


def _nothing() -> None:
    """In the place of a reference to a tensor."""


class Event:
    """One call of a layer or batch norm, or of both one after the other; or of a ReLU.

    ``used``: whether something takes the layer's output besides the batch norm, or saves the ReLU's
    besides it.
    """

    def __init__(self) -> None:
        self.code: Code | None = None
        self.detail = ""
        self.key: Any = None
        self.weight: Any = None
        self.shape: tuple[int, ...] = ()
        self.used = self.linear = self.relu = False
        self.base_of_output: Any = _nothing

    def may_be_read_by(self, function: Any) -> bool:
        """Whether a function that is no layer and no batch norm leaves the decision as it is."""
        if self.relu:
            return function in SAVES_NOTHING
        # Rows of a linear layer's output may be what a batch norm takes.
        return self.linear and function in VIEWS

    def of_layer(self, call: LayerCall, output: Tensor, as_written: str) -> None:
        self.input, self.weight = weakref.ref(call.input), weakref.ref(call.weight)
        self.output = weakref.ref(output)
        if output._base is not None:
            self.base_of_output = weakref.ref(output._base)
        self.shape, self.dtype, self.linear = output.shape, output.dtype, call.conv is None
        self.as_written = as_written

    def mark_used(self) -> None:
        self.used = True
        if self.code is Code.FUSED:
            self.code = Code.LAYER_OUTPUT_USED


class Ledger:
    """What the hooks of one model share: by module that opened a region, its last events.

    An event's key is a tensor's id and how often it was used before in the same region.
    Copies start empty.
    """

    def __init__(self) -> None:
        self.forwards: Any = torch_eager.WeakIdKeyDictionary()

    def __reduce__(self) -> tuple[type[Ledger], tuple[()]]:
        return Ledger, ()

    def begin(self, module: nn.Module) -> tuple[dict[Any, Event], dict[Any, Event]]:
        """Events of the last forward of ``module``, and a place for those of the next."""
        before = self.forwards.pop(module, {})
        now: dict[Any, Event] = {}
        self.forwards[module] = now  # the latest comes last
        return before, now
