"""Image classifiers from torchvision, timm and transformers, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..libraries import require
from .base import Case

__all__ = ["CASES"]

_RESNET_STAGES = ("conv1", "bn1", "layer1")
# The last ReLU before each pooling.
_VGG16_BN_FEATURES = tuple(f"features.{i}" for i in (5, 12, 22, 32, 42))
_VGG19_FEATURES = tuple(f"features.{i}" for i in (3, 8, 17, 26, 35))


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: require("torchvision.models").get_model(name, weights=None, **options)


def _timm(name: str) -> Callable[[], nn.Module]:
    return lambda: require("timm").create_model(name, pretrained=False)


def _transformers(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        library = require("transformers")
        return getattr(library, model)(getattr(library, config)(**options))

    return build


def _from_torchvision(name: str, **fields: Any) -> Case:
    options = fields.pop("options", {})
    return Case(name, "classification", _torchvision(name, **options), **fields)


def _from_timm(name: str, **fields: Any) -> Case:
    return Case(name, "classification", _timm(name), **fields)


CASES = [
    _from_torchvision("resnet18", first_stages=_RESNET_STAGES),
    _from_torchvision("resnet50", first_stages=_RESNET_STAGES),
    Case(
        "resnet50_batch242",
        "classification",
        _torchvision("resnet50"),
        batch=242,
        note="eval mode saves the 19.5 GB of the paper's table",
    ),
    _from_torchvision("resnet101", first_stages=_RESNET_STAGES),
    _from_torchvision("resnext50_32x4d", first_stages=_RESNET_STAGES),
    _from_torchvision("resnext101_32x8d", first_stages=_RESNET_STAGES),
    _from_torchvision("wide_resnet50_2", first_stages=_RESNET_STAGES),
    _from_torchvision("regnet_y_1_6gf"),
    _from_torchvision("regnet_x_3_2gf"),
    _from_torchvision("densenet121"),
    _from_torchvision("vgg16_bn", features=_VGG16_BN_FEATURES),
    _from_torchvision("vgg19", features=_VGG19_FEATURES, note="no batch norm"),
    _from_torchvision("googlenet", options={"aux_logits": False, "init_weights": False}),
    _from_torchvision(
        "inception_v3",
        options={"aux_logits": False, "init_weights": False},
        shape=(3, 299, 299),
        small_shape=(3, 139, 139),
        small_batch=2,
    ),
    _from_torchvision("mobilenet_v2"),
    _from_torchvision("mobilenet_v3_large"),
    _from_torchvision("mnasnet1_0"),
    _from_torchvision("shufflenet_v2_x1_0"),
    _from_torchvision("efficientnet_b0"),
    _from_torchvision("convnext_tiny", note="no batch norm, but layer scales"),
    _from_timm(
        "deit3_small_patch16_224",
        small_shape=(3, 224, 224),
        small_batch=2,
        note="no batch norm, but layer scales",
    ),
    _from_timm("hrnet_w32"),
    _from_timm("resnet50d", first_stages=_RESNET_STAGES),
    _from_timm("seresnet50", first_stages=_RESNET_STAGES),
    _from_timm("res2net50_26w_4s"),
    _from_timm("dla60"),
    _from_timm("cspdarknet53", shape=(3, 256, 256)),
    _from_timm("xception41", shape=(3, 299, 299), small_shape=(3, 139, 139), small_batch=2),
    _from_timm("ghostnet_100"),
    _from_timm("levit_128", small_shape=(3, 224, 224), small_batch=4),
    Case(
        "hf_resnet50",
        "classification",
        _transformers("ResNetForImageClassification", "ResNetConfig", num_labels=1000),
        note="transformers",
    ),
    Case(
        "hf_mobilevit",
        "classification",
        _transformers("MobileViTForImageClassification", "MobileViTConfig", num_labels=1000),
        shape=(3, 256, 256),
        small_shape=(3, 128, 128),
        small_batch=2,
        note="transformers",
    ),
]
