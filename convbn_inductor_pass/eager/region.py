"""See the convolutions and batch norms of a forward while it runs.

A region is a ``TorchFunctionMode`` that is active while one forward runs. In it, convolutions are
deferred and batch norms fused with them (see ``deferred``). Nothing is traced and nothing is
patched: Python control flow, reused modules and functional calls are what they are.

A region steps aside

* under ``torch.compile``, ``torch.export`` and ``torch.jit``: the compiled pass does the work;
* inside torch.func and forward-mode differentiation: everything runs as written;
* where the saved-tensor hooks change within it, because ``torch.utils.checkpoint`` counts what
  is saved and would not find the region again when it recomputes.

At its end, outputs still deferred are materialized, so that none outlives its forward.
"""

from __future__ import annotations

import dataclasses
import sys
import weakref
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .._torch import eager as torch_eager
from ..codes import Code
from . import deferred
from .calls import BATCH_NORMS, LAYERS, BatchNormCall, LayerCall
from .deferred import Deferred, materialized

__all__ = ["Event", "Ledger", "Region"]


@dataclasses.dataclass(eq=False)
class Event:
    """One call of a layer or batch norm, or of both as one, in the last forward that made it."""

    code: Code | None
    detail: str = ""
    weight: weakref.ref[Tensor] | None = None
    key: weakref.ref[Tensor] | None = None
    eps: float = 0.0
    call: tuple[tuple[int, ...], torch.dtype] | None = None


class Ledger:
    """What the hooks of one model share. Copies start empty.

    Attributes:
        forwards: by module that opened a region, the events of its last forward. An event's
            key is a weight's id and how often it was used before in the same region.
        plain: by weight, the uses whose output something else than a batch norm took. They
            run as written from then on, without the detour; this saves time, and is not
            needed for correctness.
    """

    def __init__(self) -> None:
        self.forwards: Any = torch_eager.WeakIdKeyDictionary()
        self.plain: Any = torch_eager.WeakIdKeyDictionary()

    def __reduce__(self) -> tuple[type[Ledger], tuple[()]]:
        return Ledger, ()


class Region(TorchFunctionMode):
    """Defers layers and fuses batch norms while the forward in ``frame`` runs."""

    def __init__(self, ledger: Ledger, module: nn.Module, frame: FrameType) -> None:
        super().__init__()
        self.plain = ledger.plain
        self.events: dict[tuple[int, int], Event] = {}
        ledger.forwards[module] = self.events
        self.frame: FrameType | None = frame
        self.handled = sys.exc_info()[1]
        self.hooks = torch_eager.saved_tensors_hooks()
        self.live: list[weakref.ref[Deferred]] = []
        self.uses: dict[int, int] = {}

    @property
    def alive(self) -> bool:
        """Whether its forward still runs; not so if an interrupt skipped its end."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame is self.frame:
                return True
            frame = frame.f_back
        return False

    @property
    def steps_aside(self) -> bool:
        return (
            torch_eager.saved_tensors_hooks() != self.hooks
            or torch.is_inference_mode_enabled()
            or torch_eager.in_functional_transform()
            or torch.jit.is_tracing()
            or not self.alive
        )

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if func in LAYERS:
            return self._layer(func, args, kwargs)
        if func in BATCH_NORMS:
            return self._batch_norm(func, args, kwargs)
        if self.live and _writes(func, args, kwargs):
            self._run_before_write(args, kwargs)
        return func(*args, **kwargs)

    def _count(self, tensor: Any) -> tuple[int, int]:
        """Which call with this tensor this is."""
        use = self.uses.get(id(tensor), 0)
        self.uses[id(tensor)] = use + 1
        return id(tensor), use

    def _layer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(args[0] if args else kwargs.get("input"), Deferred):
            args, kwargs = materialized((args, kwargs))  # no batch norm came between two layers
        call = None if self.steps_aside else LayerCall.read(func, args, kwargs)
        if call is None:
            return func(*args, **kwargs)
        key = self._count(call.weight if isinstance(call.weight, nn.Parameter) else None)
        event = Event(None, weight=weakref.ref(call.weight), call=(call.shape, call.dtype))
        self.events[key] = event
        learns = self.hooks is None and isinstance(call.weight, nn.Parameter)
        if learns and key[1] in self.plain.get(call.weight, ()):
            return func(*args, **kwargs)

        def on_use(why: Code) -> None:
            # A batch norm that could not be fused (frozen layer, training mode) may be later.
            refused = event.code not in (None, Code.FUSED)
            if event.code is Code.FUSED:
                event.code = why
            if learns and not refused:
                self.plain.setdefault(call.weight, set()).add(key[1])

        call.live, call.on_use = self.live, on_use
        call.event = event
        return Deferred.of(call)

    def _batch_norm(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bn = None if self.steps_aside else BatchNormCall.read(func, args, kwargs)
        if bn is None:
            return func(*args, **kwargs)
        code, detail = deferred.decide(bn.input, bn)
        identity = bn.weight if bn.running_mean is None else bn.running_mean
        if isinstance(bn.input, Deferred):
            event = bn.input.call.event
        else:
            event = self.events.setdefault(self._count(identity), Event(None))
        event.code, event.detail, event.eps = code, detail, bn.eps
        event.key = None if identity is None else weakref.ref(identity)
        if code is Code.FUSED:
            return deferred.fuse(bn.input.call, bn)
        return func(*args, **kwargs)

    def _run_before_write(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run deferred layers that read what a call is about to write."""
        written = {
            torch_eager.storage_key(t)
            for t in pytree.tree_leaves((args, kwargs))
            if isinstance(t, Tensor) and not isinstance(t, Deferred)
        } - {None}
        for d in deferred.live(self.live):
            if any(torch_eager.storage_key(t) in written for t in d.call.operands):
                d.materialize(Code.INPUT_MUTATED)

    def run_live(self) -> None:
        for d in deferred.live(self.live):
            if not d.call.is_modified:  # else its use, if there is any, is an error
                d.materialize()

    def end(self) -> None:
        self.frame = None
        # Not after an error: checkpoint stops recomputing by one, and counts what is saved.
        if sys.exc_info()[1] is self.handled:
            self.run_live()
        self.live.clear()


# Whoever asks for these may write without PyTorch's knowledge: NumPy, DLPack, Triton kernels.
_POINTERS = {"numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage", "storage"}


def _writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call may write into one of its arguments."""
    if isinstance(func, torch._ops.OpOverload):
        return bool(func._schema.is_mutable)
    name = getattr(func, "__name__", "")
    if name in _POINTERS:
        return True
    if name.startswith("__"):
        return name in ("__set__", "__setitem__") or name.startswith("__i")
    return (
        name.endswith("_")
        or kwargs.get("out") is not None
        or kwargs.get("inplace") is True
        or any(a is True for a in args)  # F.relu(x, True)
        or isinstance(func, torch._ops.OpOverloadPacket)
    )
