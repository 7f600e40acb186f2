"""What is noted of the calls in a forward, for :mod:`decide` and for the next forward."""

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

from ..codes import Code
from ..functional.conv_bn import Layer
from ..records import Record


def nothing() -> None:
    """In the place of a weak reference."""


@dataclasses.dataclass(eq=False, slots=True)
class Event:
    """One call of a layer or batch norm, or of both one after the other; or of a ReLU."""

    layer: Layer | None = None  # until its batch norm
    weight: Callable[[], Any] = nothing  # a weak reference, of layers
    outputs: list[Callable[[], Any]] = dataclasses.field(default_factory=list)  # of ReLUs, too
    norm: Callable[[], Any] = nothing  # to the tensor by which a batch norm is known
    shape: tuple[int, ...] = ()  # of what the batch norm takes
    nbytes: int = 0  # of that
    relu: bool = False
    linear: bool = False
    used: bool = False  # something else takes the layer's output, or saves the ReLU's
    code: Code | None = None
    detail: str = ""

    def alive(self) -> list[Any]:
        """What still exists of the output, and of rows of it that a batch norm takes."""
        return [o for output in self.outputs if (o := output()) is not None]

    def watch(self) -> tuple[bool, list[Any]]:
        """Whether the output was used elsewhere; and what still exists of it."""
        return self.used, self.alive()

    def mark_used(self) -> None:
        self.used, self.layer = True, None
        if self.code is Code.FUSED:
            self.code = Code.LAYER_OUTPUT_USED

    def record(self, paths: dict[int, str]) -> Record:
        """What was decided; ``paths`` are those of modules, by the ids of their tensors."""
        assert self.code is not None
        of = (paths.get(id(reference()), "") for reference in (self.weight, self.norm))
        layer, norm = (path.replace("_orig_mod.", "") for path in of)
        return Record(
            pass_name="eager",
            kind="batch norm",
            code=self.code,
            detail=self.detail,
            layer=layer,
            batch_norm=norm,
            output_shape=self.shape,
            output_bytes=self.nbytes,
            bytes_saved=self.nbytes if self.code.rewritten else 0,
        )


class Ledger:
    """What the hooks of one model share: by module that opened a region, its last events.

    Their keys are a tensor's id and how often it was used before in the region. Copies start empty.
    """

    def __init__(self) -> None:
        self.forwards: Any = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[type["Ledger"], tuple[()]]:
        return Ledger, ()
