"""Forward hooks that open a region where a model runs, whatever its code looks like.

``Enter`` and ``Exit`` are forward hooks on every module that contains a batch norm. The
outermost one that is called opens a :class:`Region` that is active until its forward ends, in this
thread. Hooks hold no module, so that models with them can be copied, pickled and replicated. A
module *called* under ``torch.utils.checkpoint`` opens a region of its own, in the forward and when
it is recomputed.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import weakref
from typing import Any

import torch
from torch import nn

from .._torch import eager as torch_eager
from .deferred import materialized
from .region import Ledger, Region

__all__ = ["Enter", "Exit", "Resume", "Suspend"]


class _Stack(threading.local):
    """Hooked modules whose forward runs in this thread, with the region that they opened."""

    def __init__(self) -> None:
        self.entries: list[tuple[weakref.ref[nn.Module], Region | None]] = []

    def push(self, module: nn.Module, region: Region | None) -> None:
        self.entries.append((weakref.ref(module), region))

    def region(self) -> Region | None:
        """The innermost region; forgets those whose end an interrupt skipped."""
        for i, (_, region) in reversed(list(enumerate(self.entries))):
            if region is not None:
                if region.alive:
                    return region
                self._cut(i)
        self._cut(0)
        return None

    def pop(self, module: nn.Module) -> bool:
        """Forget ``module`` and what is inside it; False if its Enter was never called."""
        for i, (reference, _) in reversed(list(enumerate(self.entries))):
            if reference() is module:
                self._cut(i)
                return True
        return False

    def _cut(self, start: int) -> None:
        for _, region in reversed(self.entries[start:]):
            if region is not None:
                # One that is not the innermost stays, without effect.
                torch_eager.remove_function_mode(region)
                region.end()
        del self.entries[start:]


_stack = _Stack()


def _aside() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


@dataclasses.dataclass(eq=False)
class Enter:
    """Forward pre-hook: opens a region, if none is open under the same saved-tensor hooks."""

    ledger: Ledger

    def __call__(self, module: nn.Module, args: Any) -> None:
        if _aside():
            return
        outer = _stack.region()
        region = None
        if outer is None or outer.hooks != torch_eager.saved_tensors_hooks():
            if outer is not None:
                outer.run_live()
            region = Region(self.ledger, module, sys._getframe(1))
            region.__enter__()
        _stack.push(module, region)


@dataclasses.dataclass(eq=False)
class Exit:
    """Forward hook, called after errors too: ends the region that ``Enter`` opened."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if _aside() or not _stack.pop(module) or _stack.region() is not None:
            return None
        return materialized(output)


class Suspend:
    """Forward pre-hook of a compiled part of a model: the region ends where it begins."""

    def __call__(self, module: nn.Module, args: Any) -> Any:
        region = None if _aside() else _stack.region()
        if region is None or not torch_eager.remove_function_mode(region):
            return None
        region.run_live()
        _stack.push(module, None)
        return materialized(args)


class Resume:
    """Forward hook of a compiled part, called after errors too: the region goes on."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if _aside() or not _stack.pop(module):
            return
        region = _stack.region()
        if region is not None:
            region.__enter__()
