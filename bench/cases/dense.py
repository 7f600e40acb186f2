"""Segmentation and video networks from torchvision."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..libraries import require
from .base import Case

__all__ = ["CASES"]


def _from_torchvision(name: str, family: str, **fields: Any) -> Case:
    def build() -> nn.Module:
        models = require("torchvision.models")
        options = {} if family == "video" else {"weights_backbone": None}
        return models.get_model(name, weights=None, **options)

    return Case(name, family, build, **fields)


_SEGMENTATION: dict[str, Any] = {
    "shape": (3, 512, 512),
    "batch": 8,
    "small_shape": (3, 96, 96),
    "small_batch": 2,
    "head": "classifier.",
}
_RESNET_STAGES = ("backbone.conv1", "backbone.bn1", "backbone.layer1")
_VIDEO: dict[str, Any] = {
    "shape": (3, 16, 112, 112),
    "batch": 16,
    "small_shape": (3, 4, 48, 48),
    "small_batch": 2,
    "first_stages": ("stem", "layer1"),
}

CASES = [
    _from_torchvision(
        "deeplabv3_resnet50", "segmentation", first_stages=_RESNET_STAGES, **_SEGMENTATION
    ),
    _from_torchvision("fcn_resnet50", "segmentation", first_stages=_RESNET_STAGES, **_SEGMENTATION),
    _from_torchvision("lraspp_mobilenet_v3_large", "segmentation", **_SEGMENTATION),
    _from_torchvision("r3d_18", "video", **_VIDEO),
    _from_torchvision("r2plus1d_18", "video", **_VIDEO),
]
