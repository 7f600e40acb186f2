"""Tune mode for the layers and batch norms of a forward, while it runs (docs/eager.md).

A batch norm after a layer runs as :func:`conv_bn.batch_norm`, which does not save its input.

Other uses of a layer's output are correct, but cost more. So a region watches outputs: if one is
used before its batch norm, or was used after it or stored in the previous forward, the batch norm
runs as written. A ReLU's output that is saved for it alone becomes a mask (:mod:`saved`).

A region steps aside where it is compiled or traced, in torch.func and forward-mode differentiation,
and where the saved-tensor hooks change within it: checkpointing would not find it when it
recomputes. Nor is anything learned under such hooks.
"""

import functools
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .. import announce
from .._torch import eager as torch_eager
from ..codes import Code
from ..config import get_options
from ..functional import conv_bn, saved
from . import calls
from .decide import decide
from .events import Event, Ledger, nothing


class _Regions(threading.local):
    """Those that are open in this thread, each inside the one before it, which it pauses."""

    def __init__(self) -> None:
        self.open: list[Region] = []


regions = _Regions()


class Region(TorchFunctionMode):
    """Runs layers and batch norms so that the layer's output is not saved."""

    def __init__(self, ledger: Ledger, module: nn.Module) -> None:
        super().__init__()
        self.hooks = torch_eager.saved_tensors_hooks()
        self.module = weakref.ref(module)
        self.handled = sys.exc_info()[1]  # an error that is being handled around the forward
        self.before: dict[Any, Event] = ledger.forwards.pop(module, {})
        self.events: dict[Any, Event] = {}
        ledger.forwards[module] = self.events  # the latest comes last
        self.uses: dict[int, int] = {}
        # By id, the outputs of layers and ReLUs, and rows made of a linear layer's.
        self.outputs: dict[int, tuple[Callable[[], Any], Event]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if torch.compiler.is_compiling() or func in calls.METADATA:
            return func(*args, **kwargs)
        if self not in regions.open[-1:]:  # another is open inside, or it has ended
            for t in calls.tensors_read(func, args, kwargs):
                if (event := self._event_of(t)) is not None:
                    event.mark_used()
            return func(*args, **kwargs)
        if func in calls.LAYERS:
            return self._layer(func, args, kwargs)
        if func is nn.functional.batch_norm:
            return self._batch_norm(func, args, kwargs)
        if func in calls.RELUS:
            return self._relu(func, args, kwargs)
        tensors = calls.tensors_read(func, args, kwargs)
        events = [event for t in tensors if (event := self._event_of(t)) is not None]
        for event in events:
            # Rows of a linear layer's output may be what a batch norm takes.
            is_rows = event.linear and func in calls.VIEWS
            if not is_rows and not (event.relu and func in calls.SAVES_NOTHING):
                event.mark_used()
        # On MPS max-pooling looks for the maxima again.
        if (
            func in calls.MAX_POOLS
            and calls.is_plain(x := args[0] if args else kwargs["input"])
            and not (x.is_mps or self._aside())
        ):
            with saved.saves_shape_only(x):
                return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in calls.VIEWS and events and events[0].linear:
            self._note(result, events[0])
        return result

    @functools.cached_property
    def trains_convolutions(self) -> bool:
        module = self.module()
        parameters = () if module is None else module.parameters()
        return any(p.ndim > 2 and p.requires_grad for p in parameters)

    def _aside(self) -> bool:
        return torch_eager.runs_as_written() or torch_eager.saved_tensors_hooks() != self.hooks

    def _count(self, tensor: Any) -> tuple[int, int]:
        """Which call with this tensor this is."""
        key = id(tensor)
        use = self.uses[key] = self.uses.get(key, -1) + 1
        return key, use

    def _note(self, value: Any, event: Event) -> None:
        # When it dies, its event goes, with what the layer computed with.
        reference = weakref.ref(value, functools.partial(self.outputs.pop, id(value)))
        event.outputs.append(reference)
        self.outputs[id(value)] = reference, event

    def _event_of(self, value: Any) -> Event | None:
        """Of the layer or ReLU whose output ``value`` is."""
        reference, event = self.outputs.get(id(value), (nothing, None))
        return event if reference() is value else None

    def _layer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, weight, bias = calls.layer_tensors(*args, **kwargs)
        is_frozen = calls.is_plain(weight) and not weight.requires_grad and calls.is_plain(x)
        shape_only = is_frozen and not (get_options().fuse_frozen_layers or self._aside())
        for t in (x, weight, bias):
            taken = self._event_of(t)
            if taken is not None and not (shape_only and t is x and taken.relu):
                taken.mark_used()
        layer = None
        if shape_only:
            with saved.saves_shape_only(x):
                c = func(*args, **kwargs)
        elif torch_eager.saved_tensors_hooks() == self.hooks:
            c, layer = conv_bn.layer(lambda: func(*args, **kwargs), x, weight, bias)
        else:
            return func(*args, **kwargs)
        self._note(c, Event(layer, weakref.ref(weight), linear=func is nn.functional.linear))
        return c

    def _batch_norm(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bn = calls.BatchNormCall(*args, **kwargs)
        x = bn.input
        if torch_eager.runs_as_written() or not isinstance(x, torch.Tensor):
            return func(*args, **kwargs)
        # FSDP hands on views of a unit's inputs.
        taken = self._event_of(x) or self._event_of(x._base)
        layer = None if taken is None or taken.relu else taken
        if layer is not None and layer.code is None:
            event = layer
        else:
            event = Event(outputs=[weakref.ref(x)])
            if layer is not None:  # this is its second batch norm
                layer.mark_used()
        identity = bn.weight if bn.running_mean is None else bn.running_mean
        key = self._count(identity)
        self.events[key] = event
        event.shape, event.nbytes = x.shape, x.nbytes
        if identity is not None:
            event.norm = weakref.ref(identity)
        if torch_eager.saved_tensors_hooks() != self.hooks:
            event.code = Code.REGION
            event.detail = "if a function is checkpointed, checkpoint a module instead"
        else:
            before = None if self.hooks else self.before.get(key)
            was_used, hooked = before is not None and before.used, self.hooks is not None
            event.code, event.detail = decide(bn, layer, was_used=was_used, hooked=hooked)
        called, event.layer = event.layer, None
        if not event.code.rewritten:
            if taken is not None and taken.relu:
                taken.mark_used()
            return func(*args, **kwargs)
        if bn.weight is not None and bn.weight.requires_grad:
            assert called is not None
            return conv_bn.batch_norm(x, called, *bn[1:5], bn.eps, event.watch)
        with saved.saves_shape_only(x):
            return func(*args, **kwargs)

    def _relu(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs["input"]
        if (taken := self._event_of(x)) is not None:
            taken.mark_used()
        wanted = calls.is_plain(x) and x.requires_grad and torch.is_grad_enabled()
        if not wanted or self._aside():
            return func(*args, **kwargs)
        key = ("ReLU", self._count(None)[1])
        before = None if self.hooks else self.before.get(key)
        if self.trains_convolutions if before is None else before.used:
            y = func(*args, **kwargs)
        else:
            with saved.saves_mask():
                y = func(*args, **kwargs)
        event = self.events[key] = Event(relu=True)
        self._note(y, event)
        return y

    def end(self, completed: bool) -> None:
        """Outputs that outlive the forward though no batch norm saves them were stored."""
        if not completed:  # by an error, as when checkpoint has recomputed what it needs
            self.events.clear()
            self.events.update(self.before)
        elif torch.is_grad_enabled():
            norms = [e for e in self.events.values() if e.code is not None]
            if all(e.code is Code.BATCH_STATISTICS for e in norms):  # a trainer's ``train()``
                announce.say(e.record({}) for e in norms)
        else:  # validation: what was learned in training stays
            for key, event in self.before.items():
                if event.relu or key in self.events:
                    self.events.setdefault(key, event).used |= event.used
        for _, event in list(self.outputs.values()):
            if (event.relu or event.code is Code.FUSED) and event.alive():
                event.mark_used()
        self.outputs.clear()
