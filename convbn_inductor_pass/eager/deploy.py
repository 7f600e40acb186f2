"""Deploy mode: pairs merged once into plain convolutions, and taken apart again.

A pair is merged if its layer and batch norm are modules of PyTorch's own (or timm's batch norm
with an activation in it), without hooks or parametrizations, that were called only together in
the forward that found them, and as modules. All else stays in eval mode.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import parametrize

from ..codes import Code
from ..functional import BatchNorm, fold_affine
from ..graph.layout import Layout
from .region import Event

__all__ = ["CountCalls", "Merged", "MergedBatchNorm", "call_counts", "count_calls", "merge_pairs"]
__all__ += ["run_once", "tensor_paths", "undo"]

_LAYERS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class MergedBatchNorm(nn.Sequential):
    """Stands where a batch norm was that is part of a convolution now; does what else it did."""


@dataclasses.dataclass
class Merged:
    """What was replaced: the layer's parameters and the batch norm, under all its paths."""

    layer: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    norms: list[str]
    norm: nn.Module


@dataclasses.dataclass(eq=False)
class CountCalls:
    """Forward pre-hook: how often a module was called. Functions that use its tensors are not."""

    calls: int = 0

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.calls += 1


def count_calls(scope: nn.Module) -> None:
    """Count the calls of the modules that could be merged, for :func:`call_counts`."""
    for module in scope.modules():
        if type(module) in _LAYERS or _is_norm(module):
            module.register_forward_pre_hook(CountCalls())


def call_counts(model: nn.Module) -> dict[nn.Module, int]:
    """How often modules were called since :func:`count_calls`."""
    hooks = ((m, hook) for m in model.modules() for hook in m._forward_pre_hooks.values())
    return {m: hook.calls for m, hook in hooks if isinstance(hook, CountCalls)}


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


def merge_pairs(
    model: nn.Module, events: Iterable[Event], calls: Mapping[nn.Module, int]
) -> list[Merged]:
    """Merge what the events of a forward allow; returns how to undo it, in order.

    ``calls`` says how often each module was called: a layer or batch norm that was also used
    through its tensors, in a functional call, is left alone.
    """
    paths = tensor_paths(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    done = []
    for weight, mean, eps, count in list(_inseparable(events)):
        layer_path, norm_path = paths.get(id(weight)), paths.get(id(mean))
        if layer_path is None or norm_path is None:
            continue
        layer, norm = modules[layer_path], modules[norm_path]
        uses = sum(p is weight for m in model.modules() for p in m._parameters.values())
        if (
            type(layer) in _LAYERS
            and _is_norm(norm)
            and (_is_free(layer) and _is_free(norm) and norm is not model)
            and calls.get(layer) == calls.get(norm) == count
            and uses == 1  # else it is tied to another module
        ):
            done.append(_merge(modules, layer_path, norm, eps))
    return done


def _inseparable(events: Iterable[Event]) -> Iterator[tuple[Tensor, Tensor, float, int]]:
    """Weights and running means that were always used as one pair; with eps and how often."""
    of_weight: dict[int, list[Event]] = collections.defaultdict(list)
    of_mean: dict[int, list[Event]] = collections.defaultdict(list)
    for e in events:
        if e.weight is not None:
            of_weight[id(_deref(e.weight))].append(e)
        if e.key is not None:
            of_mean[id(_deref(e.key))].append(e)
    for uses in of_weight.values():
        first = uses[0]
        weight, mean = _deref(first.weight), _deref(first.key)
        if weight is None or mean is None or any(e.code is not Code.FUSED for e in uses):
            continue
        # The same events, so that neither was ever used without the other.
        if uses == of_mean[id(mean)] and all(e.eps == first.eps for e in uses):
            yield weight, mean, first.eps, len(uses)


def _deref(reference: Any) -> Tensor | None:
    return None if reference is None else reference()


def _is_free(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return not any(hooks) and not parametrize.is_parametrized(module)


def _is_norm(module: nn.Module) -> bool:
    """Whether it is PyTorch's own, or timm's batch norm that goes on with ``drop`` and ``act``."""
    kind = type(module)
    is_timms = kind.__name__ == "BatchNormAct2d" and kind.__module__.startswith("timm.")
    return kind in _NORMS or is_timms


def _merge(modules: dict[str, nn.Module], layer_path: str, norm: nn.Module, eps: float) -> Merged:
    layer: Any = modules[layer_path]
    layout = Layout(isinstance(layer, _ConvTransposeNd), getattr(layer, "groups", 1))
    bn: Any = norm
    with torch.no_grad():
        tensors = BatchNorm(bn.weight, bn.bias, bn.running_mean, bn.running_var, eps)
        weight, bias = fold_affine(layer.weight, layer.bias, tensors, layout, layer.weight.dtype)
    norm_paths = [path for path, module in modules.items() if module is norm]
    merged = Merged(layer_path, layer.weight, layer.bias, norm_paths, norm)
    layer.weight, layer.bias = (
        nn.Parameter(new, requires_grad=layer.weight.requires_grad) for new in (weight, bias)
    )
    rest = MergedBatchNorm()
    for name, child in norm.named_children():  # timm's drop and act
        rest.add_module(name, child)
    rest.train(norm.training)
    for path in norm_paths:
        _set_module(modules, path, rest)
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
