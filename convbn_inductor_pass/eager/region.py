"""Tune mode for the layers and batch norms of a forward, while it runs.

A region is a ``TorchFunctionMode`` that is active while one forward runs. In it layers run as
:func:`functional.layer`, which differs from eval mode in nothing but what a batch norm can ask of
its node; and a batch norm that :func:`functional.layer_before` finds next to such a node runs as
:func:`functional.batch_norm`, which does not save its input. Every tensor is a true one, computed
when eval mode computes it: Python control flow, hooks, reused modules, functional calls, writes
and whoever stores a layer's output meet what they meet in eval mode.

Other uses of a layer's output are right, too, but cost a second weight gradient. So a region
watches outputs: one used before its batch norm is left as written; one used after it, or stored, or
that met no batch norm, in the forward before, is run as written and watched this once.

No activation is saved for its shape: not by a layer whose weight requires no gradient, nor by a
batch norm whose weight requires none, after a layer or not, nor by max-pooling. Then a ReLU's
result may be saved for the ReLU alone, which saves a mask instead where nobody else saved it in the
forward before, or, before there was one, where the model trains no convolution.

A region steps aside

* under ``torch.compile``, ``torch.export`` and ``torch.jit``: the compiled pass does the work;
* inside torch.func and forward-mode differentiation: everything runs as written;
* where the saved-tensor hooks change within it, because ``torch.utils.checkpoint`` counts what
  is saved and would not find the region again when it recomputes. For the same reason nothing is
  learned from one forward for the next under such hooks.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .. import functional
from .._torch import eager as torch_eager
from ..codes import Code
from ..config import get_options
from .calls import (
    BATCH_NORMS,
    LAYERS,
    MAX_POOLS,
    RELUS,
    BatchNormCall,
    LayerCall,
    read_max_pool,
    read_relu,
    runs_as_written,
    tensors_read,
)
from .decide import decide, why_as_written
from .events import Event, Ledger

__all__ = ["Region"]


class Region(TorchFunctionMode):
    """Runs layers and batch norms so that the layer's output is not saved."""

    def __init__(self, ledger: Ledger, module: nn.Module) -> None:
        super().__init__()
        self.hooks = torch_eager.saved_tensors_hooks()
        self.module = weakref.ref(module)
        self.before, self.events = ledger.begin(module)
        self.uses: dict[int, int] = {}
        self.outputs: dict[int, Event] = {}
        self._frozen: bool | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if func in LAYERS:
            return self._layer(func, args, kwargs)
        if func in BATCH_NORMS:
            return self._batch_norm(func, args, kwargs)
        if func in MAX_POOLS and not self._aside():
            read = read_max_pool(func, args, kwargs)
            if read is not None:
                if (taken := self._event_of(read[0])) is not None and not taken.relu:
                    taken.mark_used()
                return functional.max_pool(*read)
        self._watch(func, args, kwargs)
        if func in RELUS:
            return self._relu(func, args, kwargs)
        return func(*args, **kwargs)

    def _aside(self) -> bool:
        return runs_as_written() or torch_eager.saved_tensors_hooks() != self.hooks

    def _count(self, tensor: Any) -> tuple[int, int]:
        """Which call with this tensor this is."""
        key = id(tensor)
        use = self.uses[key] = self.uses.get(key, -1) + 1
        return key, use

    def _event_of(self, value: Any) -> Event | None:
        """Of the layer whose output ``value`` is."""
        event = None if value is None else self.outputs.get(id(value))
        known = event is not None and (event.output() is value or event.base_of_output() is value)
        return event if known else None

    def _watch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See whether a function that is no batch norm takes the output of a layer."""
        outputs = self.outputs
        for value in (*args, *kwargs.values()) if kwargs else args:
            if id(value) in outputs or type(value) in (list, tuple):
                break
        else:
            return
        for tensor in tensors_read(func, args, kwargs):
            event = self._event_of(tensor)
            if event is not None and not event.may_be_read_by(func):
                event.mark_used()

    def _layer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs.get("input")
        taken = self._event_of(x)
        call = None if self._aside() else LayerCall.read(func, args, kwargs)
        saves_input = call is None or call.weight.requires_grad or get_options().fuse_frozen_layers
        if taken is not None and (saves_input or not taken.relu):
            taken.mark_used()
        for value in (*args[1:3], *kwargs.values()):
            if (taken := self._event_of(value)) is not None and value is not x:
                taken.mark_used()
        if call is None:
            return func(*args, **kwargs)
        x, weight, bias, _ = call
        key = self._count(weight if isinstance(weight, nn.Parameter) else None)
        event = self.events[key] = Event()
        learns = saves_input and not self.hooks
        as_written = why_as_written(self.before.get(key)) if learns else ""
        needs_grad = torch.is_grad_enabled() and (
            x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        )
        if needs_grad and not as_written:
            c = functional.layer(*call, saves_input)
        else:
            c = func(*args, **kwargs)
        event.of_layer(call, c, as_written)
        self.outputs[id(c)] = event
        if c._base is not None:
            self.outputs[id(c._base)] = event
        return c

    def _batch_norm(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bn = None if runs_as_written() else BatchNormCall.read(func, args, kwargs)
        if bn is None:
            return func(*args, **kwargs)
        taken = self._event_of(bn.input) or self._event_of(bn.input._base)
        layer = event = None if taken is None or taken.relu else taken
        if layer is not None and layer.code is not None:  # a second batch norm
            layer.mark_used()
            event = None
        if torch_eager.saved_tensors_hooks() != self.hooks:
            code, detail = Code.REGION, "if by checkpointing a function: checkpoint a module"
        else:
            code, detail = decide(bn, layer)
        identity = bn.weight if bn.running_mean is None else bn.running_mean
        if event is None:
            event = self.events[self._count(identity)] = Event()
        event.code, event.detail = code, detail
        event.key = None if identity is None else weakref.ref(identity)
        if not code.rewritten:
            if taken is not None and taken.relu:
                taken.mark_used()
            return func(*args, **kwargs)
        event.shape, event.dtype = bn.input.shape, bn.input.dtype
        norm = functional.BatchNorm(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
        return functional.batch_norm(bn.input, norm)

    def _relu(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        read = None if self._aside() else read_relu(func, args, kwargs)
        if read is None:
            return func(*args, **kwargs)
        key = ("ReLU", self._count(None)[1])
        event = self.events[key] = Event()
        before = None if self.hooks else self.before.get(key)
        saves_mask = self._trains_no_convolution() if before is None else not before.used
        y = functional.relu(*read) if saves_mask else func(*args, **kwargs)
        event.relu, event.output = True, weakref.ref(y)
        self.outputs[id(y)] = event
        return y

    def _trains_no_convolution(self) -> bool:
        if self._frozen is None:
            module = self.module()
            weights = () if module is None else (p for p in module.parameters() if p.ndim > 2)
            self._frozen = not any(w.requires_grad for w in weights)
        return self._frozen

    def end(self, completed: bool) -> None:
        """Outputs that outlive the forward though no batch norm saves them were stored."""
        if not completed:  # by an error, as when checkpoint has recomputed what it needs
            self.events.clear()
            self.events.update(self.before)
        for event in self.outputs.values():
            if (event.relu or event.code is Code.FUSED) and event.output() is not None:
                event.mark_used()
        self.outputs.clear()
