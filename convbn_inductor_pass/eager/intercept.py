"""Forward hooks that open a region where a model runs, whatever its code looks like.

``Enter`` and ``Exit`` are forward hooks on every module that contains a batch norm. The
outermost one that is called opens a :class:`Region` that is active until its forward ends, in this
thread. Hooks hold no module, so that models with them can be copied, pickled and replicated. A
module *called* under ``torch.utils.checkpoint`` opens a region of its own, in the forward and when
it is recomputed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._torch import eager as torch_eager
from .events import Ledger
from .region import Region

__all__ = ["Hook", "add_hooks", "forget_interrupted", "remove_hooks", "suspended"]


@dataclasses.dataclass(eq=False)
class Hook:
    """A hook of the model whose ledger it holds.

    TorchScript, which asks hooks for their name, learns what to do instead.
    """

    ledger: Ledger

    def __getattr__(self, name: str) -> Any:
        if name == "__name__":
            name += (
                ": TorchScript cannot compile it; call convbn_inductor_pass.turn_off(model) first"
            )
        raise AttributeError(f"{type(self).__qualname__} has no {name}")


class _Running(NamedTuple):
    """A module whose forward runs; what it opened, what it paused, and what it runs in."""

    module: weakref.ref[nn.Module]
    hook: Hook | None = None
    opened: Region | None = None
    paused: Region | None = None
    region: Region | None = None


class _Stack(threading.local):
    """Hooked modules whose forward runs in this thread."""

    def __init__(self) -> None:
        self.entries: list[_Running] = []

    @property
    def top(self) -> _Running | None:
        return self.entries[-1] if self.entries else None

    def pop(self, module: nn.Module, completed: bool) -> None:
        """Forget ``module`` and what is inside it, if its Enter was called."""
        for i in range(len(self.entries) - 1, -1, -1):
            if self.entries[i].module() is module:
                self.cut(i, completed)
                return

    def cut(self, start: int, completed: bool = False) -> None:
        for entry in reversed(self.entries[start:]):
            if entry.opened is not None:
                # One that is not the innermost stays, without harm.
                torch_eager.remove_function_mode(entry.opened)
                entry.opened.end(completed)
            if entry.paused is not None:
                entry.paused.__enter__()
        del self.entries[start:]


_stack = _Stack()


def _suspend(module: nn.Module) -> None:
    region = None if _stack.top is None else _stack.top.region
    if region is not None and not torch_eager.remove_function_mode(region):
        region = None
    _stack.entries.append(_Running(weakref.ref(module), paused=region))


def forget_interrupted() -> None:
    """End regions whose forward a ``KeyboardInterrupt`` left, which skips forward hooks."""
    _stack.cut(0)


def _aside() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


class Enter(Hook):
    """Forward pre-hook: opens a region, if none is open under the same saved-tensor hooks."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        if _aside():
            return
        if _stack.entries and _stack.entries[0].hook is self:
            forget_interrupted()  # or it calls itself; then its inner forward has the region
        outer, opened = _stack.top, None
        region = None if outer is None else outer.region
        is_suspended = outer is not None and region is None
        if not is_suspended and (
            region is None or region.hooks != torch_eager.saved_tensors_hooks()
        ):
            region = opened = Region(self.ledger, module)
            region.__enter__()
        entry = _Running(weakref.ref(module), self, opened, None, region)
        _stack.entries.append(entry)


class Exit(Hook):
    """Forward hook, called after errors too: undoes what ``Enter`` or ``Suspend`` did."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not _aside():
            _stack.pop(module, completed=output is not None)  # None after an error


class Suspend(Hook):
    """Forward pre-hook of a compiled part of a model: the region ends where it begins."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not _aside():
            _suspend(module)


@contextlib.contextmanager
def suspended(module: nn.Module) -> Iterator[None]:
    """No region is active or opened within, in this thread."""
    _suspend(module)
    try:
        yield
    finally:
        _stack.pop(module, completed=True)


def _hooked(scope: nn.Module) -> Iterator[nn.Module]:
    """Modules with a batch norm inside them."""
    for module in scope.modules():
        inside = any(isinstance(m, _BatchNorm) for m in module.modules() if m is not module)
        if inside and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            yield module


def add_hooks(scope: nn.Module, ledger: Ledger) -> None:
    """Let what runs in ``scope`` run in regions, with the events in ``ledger``."""
    for module in _hooked(scope):
        if torch_eager.is_compiled_module(module):
            module.register_forward_pre_hook(Suspend(ledger))
            module.register_forward_hook(Exit(ledger), always_call=True)
        elif not any(
            isinstance(h, Enter) and h.ledger is ledger for h in module._forward_pre_hooks.values()
        ):
            module.register_forward_pre_hook(Enter(ledger))
            # First, so that other hooks see tensors; after errors too.
            module.register_forward_hook(Exit(ledger), prepend=True, always_call=True)


def remove_hooks(model: nn.Module, ledger: Ledger) -> None:
    """Take out the hooks that have this ledger."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, h in hooks.items() if isinstance(h, Hook) and h.ledger is ledger]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
                module._forward_hooks_with_kwargs.pop(key, None)
