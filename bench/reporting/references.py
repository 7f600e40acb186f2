"""Figures that others have published, to stand beside ours. None of them was measured here."""

from __future__ import annotations

import dataclasses

__all__ = ["PUBLISHED", "Published"]

_PAPER = "arXiv 2305.11624"


@dataclasses.dataclass(frozen=True)
class Published:
    """Peak memory in GB of a whole training step, eager, in eval mode and in tune mode.

    ``case`` is ours of the same architecture and batch; ``source`` says where it is from.
    """

    what: str
    case: str
    eval_gb: float
    tune_gb: float
    source: str


PUBLISHED = (
    Published("ResNet-50, CUB-200", "resnet50_batch242", 19.499, 12.323, _PAPER),
    Published("Faster R-CNN, ResNet-50", "faster_rcnn_resnet50", 3.857, 3.003, _PAPER),
    Published("RetinaNet, ResNet-50", "retinanet_resnet50", 3.631, 2.774, _PAPER),
    Published("Mask R-CNN, ResNet-101, fp16", "mask_rcnn_resnet101_fp16", 13.687, 9.980, _PAPER),
    Published("Faster R-CNN, ResNet-101", "faster_rcnn_resnet101", 5.781, 4.183, _PAPER),
    Published("Faster R-CNN, ResNeXt-101", "faster_rcnn_resnext101", 6.980, 4.773, _PAPER),
    Published("Faster R-CNN, RegNet", "faster_rcnn_regnetx", 4.361, 3.138, _PAPER),
    Published("Faster R-CNN, HRNet", "faster_rcnn_hrnet_w32", 8.504, 5.463, _PAPER),
    Published("Faster R-CNN, RepVGG, fp16", "faster_rcnn_repvgg_fp16", 15.794, 8.996, _PAPER),
    Published("ResNet-50, torch.compile", "resnet50", 5.46, 2.88, "pytorch pull request 108757"),
)
