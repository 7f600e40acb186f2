"""Forward hooks that open a region where a model runs, whatever its code looks like.

They are on every module that contains a batch norm. The outermost one that is called opens a
:class:`Region` until its forward ends, in this thread. One called under ``torch.utils.checkpoint``
opens its own, in the forward and when it is recomputed. Hooks hold no module, so that models with
them can be copied, pickled and replicated.
"""

import dataclasses
import sys
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._torch import eager as torch_eager
from .events import Ledger
from .region import Region, regions


def open_region(region: Region) -> None:
    """Let a region run, in which hooks do not open another under the same saved-tensor hooks."""
    regions.open.append(region)
    region.__enter__()


def close_region(outermost: Region, completed: bool) -> None:
    """End a region, and those that are still open in it."""
    start = regions.open.index(outermost)
    for region in reversed(regions.open[start:]):
        # One that is not the innermost function mode stays, without harm.
        torch_eager.remove_function_mode(region)
        region.end(completed)
    del regions.open[start:]


def forget_interrupted() -> None:
    """End regions whose forward a ``KeyboardInterrupt`` left, which skips forward hooks."""
    if regions.open:
        close_region(regions.open[0], completed=False)


@dataclasses.dataclass(eq=False)
class Hook:
    """A hook of the model whose ledger it holds."""

    ledger: Ledger

    def __getattr__(self, name: str) -> Any:  # TorchScript asks hooks for their name
        why = "TorchScript cannot compile it; call convbn_inductor_pass.turn_off(model) first"
        raise AttributeError(f"{type(self).__qualname__} has no {name}: {why}")


class Enter(Hook):
    """Forward pre-hook: opens a region, if none is open under the same saved-tensor hooks."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return
        if regions.open and regions.open[0].module() in (module, None):
            forget_interrupted()  # or it calls itself; then its inner forward has the region
        hooks = torch_eager.saved_tensors_hooks()
        if not regions.open or regions.open[-1].hooks != hooks:
            open_region(Region(self.ledger, module))


class Exit(Hook):
    """Forward hook, called after errors too: ends the region that ``Enter`` opened, if it did."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        for region in reversed(regions.open):
            if region.module() is module:
                # After an error the output is None, and this is called while that is handled.
                failed = output is None and sys.exc_info()[1] is not region.handled
                close_region(region, completed=not failed)
                return


def callers(scope: nn.Module, kinds: Any = _BatchNorm) -> list[nn.Module]:
    """The modules in ``scope`` whose forward may call one of these kinds of modules."""
    return [
        module
        for module in scope.modules()
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict))
        and any(isinstance(m, kinds) and m is not module for m in module.modules())
    ]


def add_hooks(scope: nn.Module, ledger: Ledger) -> None:
    """Let what runs in ``scope`` run in regions, with the events in ``ledger``."""
    for module in callers(scope):
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
