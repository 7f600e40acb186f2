"""Which batch norms of real networks forward folding recognises, and which it misses.

    python -m bench recognition [--model NAME ...]

For each network: the calls of batch norms, frozen or in eval mode, whatever class they are of;
those whose input is a layer's output as the layer made it, as hooks see when the network runs
in eager mode; and the layers that ``forward="fold"`` scales. Networks are built from their
configurations, nothing is downloaded; inputs are small, weights random. A table for the
README is printed with ``--markdown``.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import convbn_inductor_pass as cbn
from convbn_inductor_pass import Code, testing

from .libraries import MissingLibrary, require

__all__ = ["MODELS", "Recognition", "frozen_batch_norms", "recognise"]

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


@dataclasses.dataclass(frozen=True)
class Recognition:
    """Counts of calls. ``missed`` names the layers whose batch norm was not folded."""

    batch_norms: int
    after_layer: int
    folded: int
    missed: tuple[str, ...]
    classes: tuple[str, ...]


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm, by its type or, where it is written by hand, its name."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or "FrozenBatchNorm" in (
        type(module).__name__
    )


def recognise(model: nn.Module, *inputs: Any) -> Recognition:
    """Count what ``model`` (in eval mode) calls, and what forward folding folds of it."""
    calls: list[str] = []
    expected: collections.Counter[str] = collections.Counter()
    made: dict[int, tuple[str, Tensor, int]] = {}  # by storage; the tensor keeps it alive

    def after_layer(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, out: Tensor) -> None:
            made[out.untyped_storage().data_ptr()] = (name, out, out._version)

        return hook

    def before_norm(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        calls.append(type(module).__name__)
        name, _, version = made.get(inputs[0].untyped_storage().data_ptr(), ("", None, -1))
        if version == inputs[0]._version:
            expected[name] += 1

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, _LAYERS):
            handles.append(module.register_forward_hook(after_layer(name)))
        elif is_batch_norm(module):
            handles.append(module.register_forward_pre_hook(before_norm))
    with torch.no_grad():
        model(*inputs)
        for handle in handles:
            handle.remove()
        cbn.clear_records()
        with testing.fresh_compile(), cbn.options(forward="fold"):
            torch.compile(model, backend=testing.post_grad_backend())(*inputs)
    found = collections.Counter(
        r.layer for r in cbn.records() if r.kind == "layer" and r.code is Code.FOLDED
    )
    missed = tuple(sorted((expected - found).elements()))
    return Recognition(
        batch_norms=len(calls),
        after_layer=expected.total(),
        folded=expected.total() - len(missed),
        missed=missed,
        classes=tuple(sorted(set(calls))),
    )


def _frozen_resnet(name: str) -> nn.Module:
    norm = require("torchvision.ops").FrozenBatchNorm2d
    return getattr(require("torchvision.models"), name)(norm_layer=norm)


def _detector(name: str) -> nn.Module:
    """A detector's backbone, whose batch norms torchvision freezes with pretrained weights only."""
    utils = require("torchvision.models.detection.backbone_utils")
    norm = require("torchvision.ops").FrozenBatchNorm2d
    if name.startswith("mobilenet"):
        return utils.mobilenet_backbone(
            backbone_name=name, weights=None, fpn=True, norm_layer=norm, trainable_layers=2
        )
    return utils.resnet_fpn_backbone(
        backbone_name=name, weights=None, norm_layer=norm, trainable_layers=3
    )


def _timm(name: str) -> nn.Module:
    layers, model = require("timm.layers"), require("timm").create_model(name)
    return layers.freeze_batch_norm_2d(model)


class _Masked(nn.Module):
    """A backbone of transformers; most want a mask of the pixels, too."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.masked = "pixel_mask" in inspect.signature(backbone.forward).parameters

    def forward(self, x: Tensor) -> Any:
        mask = torch.ones(x.shape[0], *x.shape[2:], dtype=torch.bool)
        return self.backbone(x, mask) if self.masked else self.backbone(x)


def _of_transformers(model_type: str) -> Any:
    """A model's file; some import torchvision where it is installed, but none needs it."""
    with contextlib.suppress(MissingLibrary):
        require("torchvision")
    return require(f"transformers.models.{model_type}.modeling_{model_type}")


def _transformers(model_type: str) -> nn.Module:
    """A detector's backbone with its own frozen batch norms, ResNet-50 or smaller inside."""
    transformers = require("transformers")
    inside = "HGNetV2Config" if model_type in _HGNET else "ResNetConfig"
    backbone = getattr(transformers, inside)(out_features=["stage2", "stage3", "stage4"])
    known = model_type in transformers.CONFIG_MAPPING
    config = transformers.AutoConfig.for_model(
        model_type if known else model_type.replace("_", "-"),
        use_timm_backbone=False,
        backbone=None,
        backbone_config=backbone,
    )
    module = _of_transformers(model_type)
    (encoder,) = (
        v for k, v in vars(module).items() if k.endswith("ConvEncoder") and "DINOv3" not in k
    )
    return _Masked(encoder(config))


def _levit() -> nn.Module:
    transformers = require("transformers")
    return transformers.LevitModel(transformers.LevitConfig(depths=[2, 2, 2]))


_HGNET = ("d_fine", "deimv2", "pp_doclayout_v3", "pp_doclayout_v4")
_DETECTORS = (
    *("conditional_detr", "d_fine", "dab_detr", "deformable_detr", "deimv2", "detr"),
    *("grounding_dino", "mm_grounding_dino", "pp_doclayout_v2", "pp_doclayout_v3"),
    *("pp_doclayout_v4", "rt_detr", "rt_detr_v2", "table_transformer"),
)
_TIMM = (
    *("resnet18", "resnet50", "resnext50_32x4d", "regnety_002", "efficientnet_b0"),
    *("mobilenetv3_small_050", "hrnet_w18_small", "densenet121", "dla34", "repvgg_a0"),
    *("cspdarknet53", "inception_v3", "ghostnet_100", "vovnet39a", "levit_128s", "fastvit_t8"),
)


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{
        f"torchvision {name}": functools.partial(_frozen_resnet, name)
        for name in ("resnet50", "resnext50_32x4d")
    },
    **{
        f"torchvision {name}, detectors": functools.partial(_detector, name)
        for name in ("resnet50", "mobilenet_v3_large")
    },
    **{f"timm {name}": functools.partial(_timm, name) for name in _TIMM},
    **{f"transformers {name}": functools.partial(_transformers, name) for name in _DETECTORS},
    "transformers levit": _levit,
}


def frozen_batch_norms(library: str) -> dict[str, Callable[[int], nn.Module]]:
    """Every class of frozen batch norms in an installed library, by its full name."""
    files = {
        "torchvision": lambda: [require("torchvision.ops.misc")],
        "timm": lambda: [require("timm.layers.norm_act")],
        "transformers": lambda: [_of_transformers(name) for name in _DETECTORS],
    }[library]()
    return {
        f"{file.__name__}.{name}": value
        for file in files
        for name, value in vars(file).items()
        if isinstance(value, type)
        and "FrozenBatchNorm" in name
        and value.__module__ == file.__name__
    }


HEADER = ("network", "batch norms", "after a layer", "folded", "missed", "classes")
