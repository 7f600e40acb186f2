"""Pairs of a convolution or linear layer and a batch norm, as modules; merged or tuned eagerly.

Two providers work on modules rather than on graphs:

* deploy: each pair becomes one layer with the merged weight and bias, both trainable. It is
  the lower limit of memory and time, but not the same training (the paper's section 3).
* eager tune: what MMEngine's ``efficient_conv_bn_eval`` does, written independently: the
  weight is merged in each forward, under plain autograd.

Pairs are found by running the network once and seeing which batch norm gets the very tensor
that a layer returned, so that names and nesting of the modules do not matter.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convbn_inductor_pass.graph.layout import Layout, scale_weight

from .protocols import is_batch_norm

__all__ = ["find_pairs", "merge", "tune_eagerly"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear)


def find_pairs(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, str]:
    """Run ``model`` and return {name of a batch norm: name of the layer before it}.

    Only modules that run once are paired, and a layer with one batch norm only.
    """
    made: dict[int, tuple[str, Tensor]] = {}
    runs: dict[str, int] = {}
    pairs: dict[str, str] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            runs[name] = runs.get(name, 0) + 1
            if type(module) in _LAYERS:
                made[id(output)] = (name, output)
            elif args and id(args[0]) in made:
                pairs[name] = made[id(args[0])][0]

        return hook

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            if type(module) in _LAYERS or is_batch_norm(module):
                handle = module.register_forward_hook(record(name))
                hooks.callback(handle.remove)
        model(*inputs)
    layers = list(pairs.values())
    return {
        bn: layer
        for bn, layer in pairs.items()
        if runs[bn] == runs[layer] == 1 and layers.count(layer) == 1
    }


def _scale_and_shift(bn: Any) -> tuple[Tensor, Tensor]:
    scale = (bn.running_var + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight
    shift = -bn.running_mean * scale
    return scale, shift if bn.bias is None else shift + bn.bias


def _merged(layer: Any, bn: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one layer that does what ``bn(layer(x))`` does."""
    scale, shift = _scale_and_shift(bn)
    layout = Layout(isinstance(layer, _TRANSPOSED), getattr(layer, "groups", 1))
    weight = scale_weight(layer.weight, scale, layout)
    bias = shift if layer.bias is None else torch.addcmul(shift, scale, layer.bias)
    return weight.to(layer.weight.dtype), bias.to(layer.weight.dtype)


class _Tuned(nn.Module):
    """A layer and its batch norm as one, merged in each forward."""

    def __init__(self, layer: nn.Module, bn: nn.Module) -> None:
        super().__init__()
        self.layer, self.bn = layer, bn

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = _merged(self.layer, self.bn)
        return _apply(self.layer, x, weight, bias)


def _apply(layer: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    if isinstance(layer, _TRANSPOSED):
        function: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[x.ndim - 3]
        geometry = (layer.stride, layer.padding, layer.output_padding, layer.groups)
        return function(x, weight, bias, *geometry, layer.dilation)
    return layer._conv_forward(x, weight, bias)


def _after(bn: nn.Module) -> nn.Module:
    """What is left of a batch norm module without its affine: timm's ones hold an activation."""
    rest = [getattr(bn, name) for name in ("drop", "act") if hasattr(bn, name)]
    return nn.Sequential(*rest) if rest else nn.Identity()


def _pairs_of_copy(
    model: nn.Module, inputs: tuple[Any, ...]
) -> tuple[nn.Module, Iterator[tuple[str, nn.Module, str, nn.Module]]]:
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    pairs = find_pairs(model, inputs)
    return model, ((layer, modules[layer], bn, modules[bn]) for bn, layer in pairs.items())


def merge(model: nn.Module, inputs: tuple[Any, ...]) -> nn.Module:
    """Deploy mode: a copy of ``model`` with every pair merged into one layer.

    Merged weight and bias require gradients if any parameter of the pair did.
    """
    model, pairs = _pairs_of_copy(model, inputs)
    for _, layer, bn_name, bn in pairs:
        trains = any(p.requires_grad for m in (layer, bn) for p in m.parameters(recurse=False))
        with torch.no_grad():
            weight, bias = _merged(layer, bn)
        layer.weight = nn.Parameter(weight, requires_grad=trains)
        layer.bias = nn.Parameter(bias, requires_grad=trains)
        model.set_submodule(bn_name, _after(bn))
    return model


def tune_eagerly(model: nn.Module, inputs: tuple[Any, ...]) -> nn.Module:
    """Eager tune mode: a copy of ``model`` whose pairs merge their weight in each forward."""
    model, pairs = _pairs_of_copy(model, inputs)
    for layer_name, layer, bn_name, bn in pairs:
        model.set_submodule(bn_name, _after(bn))
        model.set_submodule(layer_name, _Tuned(layer, bn))
    return model
