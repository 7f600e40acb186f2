"""Deploy mode: pairs merged once into plain convolutions, and taken apart again.

A pair is merged if its layer and batch norm are modules of PyTorch's own, without hooks or
parametrizations, each called once in the forward that found them. All else stays in eval mode.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import parametrize

from . import fold
from .codes import Code
from .folded import fold_affine
from .intercept import Event

__all__ = [
    "MergeAfterForward",
    "Merged",
    "MergedBatchNorm",
    "merge_pairs",
    "run_once",
    "tensor_paths",
    "undo",
]

_LAYERS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class MergedBatchNorm(nn.Identity):
    """Stands where a batch norm was that is part of a convolution now."""


@dataclasses.dataclass
class Merged:
    """What was replaced: the layer's parameters and the batch norm, under all its paths."""

    layer: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    norms: list[str]
    norm: nn.Module


@dataclasses.dataclass(eq=False)
class MergeAfterForward:
    """Forward hook that calls ``finish(model)``, a function of a module, for pickling."""

    finish: Callable[[nn.Module], None]

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.finish(module)


def tensor_paths(model: nn.Module) -> dict[int, str]:
    """Path of the module that a parameter or buffer belongs to, by the tensor's id."""
    paths: dict[int, str] = {}
    for path, module in model.named_modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                paths.setdefault(id(tensor), path)
    return paths


def run_once(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Run a forward that leaves no trace, as far as evaluation mode has none."""
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for module, flag in training.items():
            module.training = flag


def merge_pairs(model: nn.Module, events: Iterable[Event]) -> list[Merged]:
    """Merge what the events of a forward allow; returns how to undo it, in order."""
    events = list(events)
    paths = tensor_paths(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    layer_calls = collections.Counter(id(_deref(e.weight)) for e in events if e.weight)
    norm_calls = collections.Counter(id(_deref(e.key)) for e in events if e.key)
    done = []
    for e in events:
        weight, mean = _deref(e.weight), _deref(e.key)
        if e.code is not Code.FUSED or weight is None or mean is None:
            continue
        if layer_calls[id(weight)] != 1 or norm_calls[id(mean)] != 1:
            continue
        layer_path, norm_path = paths.get(id(weight)), paths.get(id(mean))
        if layer_path is None or norm_path is None:
            continue
        layer, norm = modules[layer_path], modules[norm_path]
        if not _is_plain(layer, _LAYERS) or not _is_plain(norm, _NORMS) or norm is model:
            continue
        if sum(p is weight for m in model.modules() for p in m._parameters.values()) != 1:
            continue  # tied to another module
        done.append(_merge(modules, layer_path, norm, e.eps))
    return done


def _deref(reference: Any) -> Tensor | None:
    return None if reference is None else reference()


def _is_plain(module: nn.Module, types: tuple[type[nn.Module], ...]) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return type(module) in types and not any(hooks) and not parametrize.is_parametrized(module)


def _merge(modules: dict[str, nn.Module], layer_path: str, norm: nn.Module, eps: float) -> Merged:
    layer: Any = modules[layer_path]
    transposed = isinstance(layer, _ConvTransposeNd)
    layout = fold.Layout(transposed, getattr(layer, "groups", 1))
    bn: Any = norm
    with torch.no_grad():
        weight, bias = fold_affine(
            *(layer.weight, layer.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var),
            *(eps, layout, layer.weight.dtype),
        )
    norm_paths = [path for path, module in modules.items() if module is norm]
    merged = Merged(layer_path, layer.weight, layer.bias, norm_paths, norm)
    layer.weight, layer.bias = (
        nn.Parameter(new, requires_grad=layer.weight.requires_grad) for new in (weight, bias)
    )
    for path in norm_paths:
        _set_module(modules, path, MergedBatchNorm())
    return merged


def _set_module(modules: dict[str, nn.Module], path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    modules[parent]._modules[name] = module


def undo(model: nn.Module, merged: Merged) -> None:
    """Put the parameters and the batch norm back that :func:`merge_pairs` took out."""
    modules = dict(model.named_modules(remove_duplicate=False))
    layer: Any = modules[merged.layer]
    layer.weight, layer.bias = merged.weight, merged.bias
    for path in merged.norms:
        _set_module(modules, path, merged.norm)
