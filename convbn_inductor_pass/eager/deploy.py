"""Deploy mode: pairs merged once into plain convolutions, and taken apart again.

A pair is merged if its layer and batch norm are modules of PyTorch's own (or timm's batch norm
with an activation in it), without hooks or parametrizations, that were called only together in
the forward that found them, and as modules. All else stays in eval mode.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import parametrize

from ..codes import Code
from ..functional import BatchNorm, fold_affine
from ..graph.layout import Layout
from ..records import Record
from .intercept import Hook, suspended
from .observe import LayerUse, NormUse, Observer

__all__ = ["Merged", "MergedBatchNorm", "merge_pairs", "tensor_paths", "undo"]

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


def tensor_paths(model: nn.Module) -> dict[int, str]:
    """Path of the module that a parameter or buffer belongs to, by the tensor's id."""
    paths: dict[int, str] = {}
    for path, module in model.named_modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                paths.setdefault(id(tensor), path)
    return paths


def merge_pairs(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], norms: Collection[nn.Module]
) -> tuple[list[Merged], list[Record]]:
    """Merge the pairs that a forward on these inputs shows; how to undo it, and what was decided.

    Args:
        model: the model, of which that forward leaves no trace, as far as evaluation mode has none.
        args, kwargs: inputs of the model.
        norms: the batch norms that may be merged.
    """
    observer, calls = _run_once(model, args, kwargs)
    paths = tensor_paths(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    by_mean: dict[int, list[NormUse]] = collections.defaultdict(list)
    for norm_use in observer.norms:
        by_mean[id(norm_use.mean)].append(norm_use)
    merged, records = [], []
    for uses in by_mean.values():
        first = uses[0].layer
        layer_path = None if first is None else paths.get(id(first.weight))
        norm_path = paths.get(id(uses[0].mean))
        layer, norm = (None if p is None else modules[p] for p in (layer_path, norm_path))
        if norm is None or norm not in norms:
            continue
        code, detail = _decide(uses, observer)
        if code is Code.MERGED and (why_not := _why_not(model, layer, norm, calls, len(uses))):
            code, detail = Code.NOT_MERGED, why_not
        if code is Code.MERGED and layer_path is not None:
            merged.append(_merge(modules, layer_path, norm, uses[0].eps))
        records.append(_record(code, detail, layer_path or "", norm_path or "", first))
    return merged, records


def _run_once(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Observer, dict[nn.Module, int]]:
    """What a forward shows, and how often it called each module that could be merged."""
    training = {m: m.training for m in model.modules()}
    calls: dict[nn.Module, int] = collections.defaultdict(int)

    def count(module: nn.Module, args: Any) -> None:
        calls[module] += 1

    def restore() -> None:
        for module, flag in training.items():
            module.training = flag

    model.eval()
    with contextlib.ExitStack() as stack:
        stack.callback(restore)
        for module in training:
            if type(module) in _LAYERS or _is_norm(module):
                stack.callback(module.register_forward_pre_hook(count).remove)
        stack.enter_context(suspended(model))
        observer = stack.enter_context(Observer())
        with torch.no_grad():
            model(*args, **kwargs)
    observer.end()
    return observer, calls


def _decide(uses: list[NormUse], observer: Observer) -> tuple[Code, str]:
    """Whether merging would change nothing, from all calls of a batch norm."""
    first = uses[0].layer
    if any(u.batch_statistics for u in uses):
        return Code.BATCH_STATISTICS, ""
    if first is None or any(u.layer is None for u in uses):
        return Code.NOT_AFTER_LAYER, ""
    if any(u.layer.used for u in uses if u.layer is not None):
        return Code.LAYER_OUTPUT_USED, ""
    layers = [u for u in observer.layers if u.weight is first.weight]
    if len(layers) != len(uses) or any(u.layer not in layers for u in uses):
        return Code.NOT_MERGED, "the layer and the batch norm are also called without each other"
    if any(u.eps != uses[0].eps for u in uses):
        return Code.NOT_MERGED, "the batch norm is called with different eps"
    return Code.MERGED, ""


def _why_not(
    model: nn.Module, layer: Any, norm: Any, calls: dict[nn.Module, int], uses: int
) -> str:
    """Why a layer and its batch norm cannot be replaced as modules; "" if they can."""
    if layer is None:
        return "the layer's weight is computed, as by a parametrization, or in no module"
    if type(layer) not in _LAYERS or not _is_norm(norm) or norm is model:
        return "the layer or the batch norm is not a module of PyTorch's own"
    if not _is_free(layer) or not _is_free(norm):
        return "the layer or the batch norm has hooks or a parametrization"
    if not calls[layer] == calls[norm] == uses:
        return "the layer or the batch norm is used in a functional call"
    if sum(p is layer.weight for m in model.modules() for p in m._parameters.values()) != 1:
        return "the layer's weight is tied to another module's"
    return ""


def _record(code: Code, detail: str, layer: str, norm: str, use: LayerUse | None) -> Record:
    size = 0 if use is None else math.prod(use.shape) * use.dtype.itemsize
    return Record(
        pass_name="eager",
        kind="batch norm",
        code=code,
        detail=detail,
        layer=layer,
        batch_norm=norm,
        output_shape=() if use is None else use.shape,
        output_bytes=size,
        bytes_saved=size if code is Code.MERGED else 0,
    )


def _is_free(module: nn.Module) -> bool:
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return all(isinstance(h, Hook) for h in hooks) and not parametrize.is_parametrized(module)


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
