"""The dense part of detectors: backbone, feature pyramid and the heads that see every location.

This is what ``torch.compile`` gets of a detector: what comes after it (anchors, proposals,
sampling, region heads on a few hundred boxes) depends on data. Its activations are most of what
a detector saves for backward. Faster and Mask R-CNN have the same dense part. Images of
800 x 1333 are padded to 800 x 1344, as detectors pad them to a multiple of 32.

The paper's tables use MMDetection; these networks are torchvision's and timm's of the same
architecture, all with a feature pyramid of 256 channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..libraries import require
from ..models.repvgg import repvgg_a0
from .base import Case

__all__ = ["CASES"]

_ANCHORS = 3


class DenseDetector(nn.Module):
    """``[N, 3, H, W]`` -> the head's outputs over all pyramid levels, as a tuple of tensors."""

    def __init__(self, features: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.head = head

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        levels = list(self.features(images).values())
        return tuple(_flatten(self.head(levels)))


def _flatten(value: Tensor | Mapping[str, Any] | Iterable[Any]) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value
    return [tensor for item in items for tensor in _flatten(item)]


class _Pyramid(nn.Module):
    """A backbone that returns a list of features, with torchvision's feature pyramid."""

    def __init__(self, backbone: nn.Module, channels: list[int]) -> None:
        super().__init__()
        ops = require("torchvision.ops.feature_pyramid_network")
        self.backbone = backbone
        self.fpn = ops.FeaturePyramidNetwork(channels, 256, ops.LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(i): f for i, f in enumerate(self.backbone(images))})


def _resnet_fpn(name: str, *, frozen_norm: bool, **options: Any) -> nn.Module:
    utils = require("torchvision.models.detection.backbone_utils")
    ops = require("torchvision.ops")
    norm = ops.FrozenBatchNorm2d if frozen_norm else nn.BatchNorm2d
    return utils.resnet_fpn_backbone(
        backbone_name=name, weights=None, norm_layer=norm, trainable_layers=5, **options
    )


def _rpn_head() -> nn.Module:
    return require("torchvision.models.detection.rpn").RPNHead(256, _ANCHORS)


def _rcnn(name: str, *, frozen_norm: bool = False) -> Callable[[], nn.Module]:
    return lambda: DenseDetector(_resnet_fpn(name, frozen_norm=frozen_norm), _rpn_head())


def _rcnn_timm(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        backbone = require("timm").create_model(
            name, pretrained=False, features_only=True, out_indices=(1, 2, 3, 4)
        )
        return DenseDetector(_Pyramid(backbone, backbone.feature_info.channels()), _rpn_head())

    return build


def _rcnn_repvgg() -> nn.Module:
    return DenseDetector(_Pyramid(repvgg_a0(features_only=True), [48, 96, 192, 1280]), _rpn_head())


def _one_stage(kind: str, *, frozen_norm: bool = False) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        pyramid = require("torchvision.ops.feature_pyramid_network")
        module = require(f"torchvision.models.detection.{kind}")
        last = pyramid.LastLevelP6P7(2048 if kind == "retinanet" else 256, 256)
        features = _resnet_fpn(
            "resnet50", frozen_norm=frozen_norm, returned_layers=[2, 3, 4], extra_blocks=last
        )
        if kind == "retinanet":
            return DenseDetector(features, module.RetinaNetHead(256, 9, 91))
        return DenseDetector(features, module.FCOSHead(256, 1, 91))

    return build


def _case(name: str, build: Callable[[], nn.Module], batch: int = 2, **fields: Any) -> Case:
    fields.setdefault(
        "first_stages", tuple(f"features.body.{s}" for s in ("conv1", "bn1", "layer1"))
    )
    return Case(
        name,
        "detection",
        build,
        shape=(3, 800, 1344),
        batch=batch,
        small_shape=(3, 128, 128),
        small_batch=2,
        head="head.",
        **fields,
    )


CASES = [
    _case("faster_rcnn_resnet50", _rcnn("resnet50")),
    _case(
        "faster_rcnn_resnet50_frozen_bn",
        _rcnn("resnet50", frozen_norm=True),
        note="FrozenBatchNorm: eval mode saves no more than deploy mode already",
    ),
    _case("faster_rcnn_resnet101", _rcnn("resnet101")),
    _case("mask_rcnn_resnet101_fp16", _rcnn("resnet101"), batch=16, precision="fp16-autocast"),
    _case("retinanet_resnet50", _one_stage("retinanet")),
    _case("retinanet_resnet50_frozen_bn", _one_stage("retinanet", frozen_norm=True)),
    _case("fcos_resnet50", _one_stage("fcos")),
    _case("faster_rcnn_resnext101", _rcnn_timm("resnext101_64x4d"), first_stages=()),
    _case("faster_rcnn_regnetx", _rcnn_timm("regnetx_032"), first_stages=()),
    _case("faster_rcnn_hrnet_w32", _rcnn_timm("hrnet_w32"), first_stages=()),
    _case(
        "faster_rcnn_repvgg_fp16",
        _rcnn_repvgg,
        batch=16,
        precision="fp16-autocast",
        first_stages=("features.backbone.stem", "features.backbone.stages.0"),
    ),
]
