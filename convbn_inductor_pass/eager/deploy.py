"""Deploy mode: merge pairs into plain convolutions once, and undo it.

Merging changes a layer's output: a forward has to show that only its batch norm uses that.
"""

import collections
from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils import _pytree as pytree

from ..codes import Code
from ..graph.layout import Layout, scale_weight
from ..records import Record
from .calls import tensors_read
from .events import Event, Ledger, nothing
from .intercept import Hook, close_region, open_region
from .region import Region

_LAYERS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class _CountingRegion(Region):
    """Also counts, by id, the tensors that functions take."""

    def __init__(self, ledger: Ledger, module: nn.Module) -> None:
        super().__init__(ledger, module)
        self.reads: Counter[int] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.reads.update(map(id, tensors_read(func, args, kwargs or {})))
        return super().__torch_function__(func, types, args, kwargs)


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers of a module, without those of the modules in it."""
    own = (*module._parameters.values(), *module._buffers.values())  # methods may be overridden
    return [t for t in own if t is not None]


class MergedBatchNorm(nn.Sequential):
    """Replaces a batch norm merged into a convolution; does whatever else it did."""


Replaced = tuple[str, str, Any]
"""Path of a module, an attribute of it, and the parameter or batch norm that it was."""


def tensor_paths(model: nn.Module) -> dict[int, str]:
    """Path of the module that a parameter or buffer belongs to, by the tensor's id."""
    paths: dict[int, str] = {}
    for path, module in model.named_modules():
        for tensor in _tensors(module):
            paths.setdefault(id(tensor), path)
    return paths


def merge_pairs(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], norms: Collection[str]
) -> tuple[list[Replaced], list[Record]]:
    """Merge the pairs that a forward on these inputs shows; what was replaced, and decided.

    ``norms`` are the paths of the batch norms that may be merged.
    """
    events, calls, reads = run_once(model, args, kwargs)
    paths = tensor_paths(model)
    modules = dict(model.named_modules())
    by_norm: dict[str, list[Event]] = collections.defaultdict(list)
    for event in events:
        by_norm[paths.get(id(event.norm()), "")].append(event)
    replaced, records = [], []
    for path, uses in by_norm.items():
        if path not in norms:
            continue
        norm, first = modules[path], uses[0]
        layer_path = paths.get(id(first.weight()), "")
        layer: Any = modules[layer_path] if layer_path else None
        layers = [e for e in events if e.weight() is first.weight()]
        together = layers == uses and calls[layer] == calls[norm] == len(uses)
        why_not = _why_not(model, layer, norm, together)
        own = () if why_not else (*_tensors(layer), *_tensors(norm))
        if any(reads[id(t)] not in (0, len(uses)) for t in own):
            why_not = "a parameter or buffer of the layer or the batch norm is used elsewhere, too"
        first.code, first.detail = _decide(uses, why_not)
        if first.code is Code.MERGED:
            replaced += _merge(model, layer_path, norm)
        records.append(first.record(paths))
    return replaced, records


def run_once(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Event], Counter[nn.Module], Counter[int]]:
    """What a forward shows; how often it called a module, and took or returned a tensor.

    Tensors by id: of those that do not outlive the forward, ids are counted, too, and may repeat.
    """
    training = {m: m.training for m in model.modules()}
    calls: Counter[nn.Module] = Counter()
    counted = [m for m in training if type(m) in _LAYERS or _is_norm(m)]
    hooks = [m.register_forward_pre_hook(lambda m, _: calls.update([m])) for m in counted]
    model.eval()
    nobody = nn.Module()  # whose forward could end the region
    region = _CountingRegion(Ledger(), nobody)
    open_region(region)
    try:
        with torch.no_grad():
            result = model(*args, **kwargs)
    finally:
        close_region(region, completed=True)
        for hook in hooks:
            hook.remove()
        for module, flag in training.items():
            module.training = flag
    region.reads.update(map(id, pytree.tree_leaves(result)))
    events = list(region.events.values())
    for event in events:
        event.used |= bool(event.alive())  # stored, or in the result
    del result
    return events, calls, region.reads


def _decide(uses: list[Event], not_merged: str) -> tuple[Code, str]:
    """Whether merging would change nothing, from all calls of a batch norm."""
    if any(e.code is Code.BATCH_STATISTICS for e in uses):
        return Code.BATCH_STATISTICS, ""
    if any(e.weight is nothing for e in uses):
        return Code.NOT_AFTER_LAYER, ""
    if any(e.used for e in uses):
        return Code.LAYER_OUTPUT_USED, ""
    if not_merged:
        return Code.NOT_MERGED, not_merged
    for event in uses:  # is dimension 1 of the batch norm's input the layer's channels?
        shape, weight = event.shape, event.weight()
        if len(shape) != weight.ndim or (event.linear and shape[1] != len(weight)):
            return Code.UNBATCHED, ""
    return Code.MERGED, ""


def _why_not(model: nn.Module, layer: Any, norm: Any, together: bool) -> str:
    """Why a layer and its batch norm cannot be replaced as modules; "" if they can."""
    if layer is None:
        return "the layer's weight is computed, as by a parametrization, or not in a module"
    if type(layer) not in _LAYERS or not _is_norm(norm) or norm is model:
        return "the layer or the batch norm is not one of PyTorch's own modules"
    hooks = (m._forward_hooks | m._forward_pre_hooks for m in (layer, norm))
    if not all(isinstance(h, Hook) for of_module in hooks for h in of_module.values()):
        return "the layer or the batch norm has hooks"
    if not together:
        return "the layer and the batch norm are also called without each other, or as functions"
    if sum(p is layer.weight for m in model.modules() for p in m._parameters.values()) != 1:
        return "the layer's weight is tied to another module's"
    return ""


def _is_norm(module: nn.Module) -> bool:
    """Whether it is PyTorch's own, or timm's batch norm that goes on with ``drop`` and ``act``."""
    kind = type(module)
    is_timms = kind.__name__ == "BatchNormAct2d" and kind.__module__.startswith("timm.")
    return kind in _NORMS or is_timms


def _merge(model: nn.Module, layer_path: str, norm: Any) -> list[Replaced]:
    layer: Any = model.get_submodule(layer_path)
    paths = [path for path, m in model.named_modules(remove_duplicate=False) if m is norm]
    replaced = [(layer_path, name, getattr(layer, name)) for name in ("weight", "bias")]
    statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    # Of ones, because it does not know transposed convolutions with groups.
    ones = torch.ones_like(norm.running_mean)[:, None]
    scale, bias = fuse_conv_bn_weights(ones, layer.bias, *statistics)
    layout = Layout(isinstance(layer, _ConvTransposeNd), getattr(layer, "groups", 1))
    weight = scale_weight(layer.weight, scale.flatten(), layout)
    layer.weight, layer.bias = (
        nn.Parameter(t.detach().to(layer.weight.dtype), layer.weight.requires_grad)
        for t in (weight, bias)
    )
    # timm's batch norm also applies its "drop" and "act".
    rest = MergedBatchNorm(collections.OrderedDict(norm.named_children())).train(norm.training)
    for path in paths:
        parent, _, name = path.rpartition(".")
        replaced.append((parent, name, norm))
        model.set_submodule(path, rest)
    return replaced
