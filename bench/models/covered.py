"""The networks that ``python -m bench eager-coverage`` measures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..libraries import require
from .transposed import UNet

__all__ = ["NETWORKS", "M", "SharedHead"]


class M(nn.Module):
    """The paper's ``M``: pairs across modules that are nested and wrapped."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.nested = nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
        self.wrapped = nn.Sequential(nn.Sequential(nn.BatchNorm2d(8)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        return self.wrapped(self.nested(self.conv2(x)))


class SharedHead(nn.Module):
    """RetinaNet's head on three levels; torchvision's, or with batch norms of each level's own."""

    def __init__(self, head: nn.Module | None, width: int = 16) -> None:
        super().__init__()
        self.lateral = nn.Conv2d(3, width, 1)
        self.head = head
        if head is None:
            self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(4))
            self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(12))

    def forward(self, x: Tensor) -> Any:
        levels = [self.lateral(x[..., ::s, ::s]) for s in (1, 2, 4)]
        if self.head is not None:
            return self.head(levels)
        for i, conv in enumerate(self.convs):
            levels = [F.relu(self.norms[3 * i + k](conv(y))) for k, y in enumerate(levels)]
        return levels


def _retina_head() -> nn.Module:
    retinanet = require("torchvision.models.detection.retinanet")
    return SharedHead(retinanet.RetinaNetHead(16, 9, 5, norm_layer=nn.BatchNorm2d))


def _torchvision(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(require("torchvision.models"), name)(**kwargs)


def _timm(name: str) -> Callable[[], nn.Module]:
    return lambda: require("timm").create_model(name)


# By name: what makes the network, and the height and width of its inputs.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "the paper's M": (M, 32),
    "resnet18": (_torchvision("resnet18"), 64),
    "resnet50": (_torchvision("resnet50"), 64),
    "regnet_y_400mf": (_torchvision("regnet_y_400mf"), 64),
    "mobilenet_v2": (_torchvision("mobilenet_v2"), 64),
    "mobilenet_v3_small": (_torchvision("mobilenet_v3_small"), 64),
    "efficientnet_b0": (_torchvision("efficientnet_b0"), 64),
    "inception_v3": (
        _torchvision("inception_v3", aux_logits=False, init_weights=False),
        96,
    ),
    "densenet121": (_torchvision("densenet121"), 64),
    "shufflenet_v2_x0_5": (_torchvision("shufflenet_v2_x0_5"), 64),
    "timm resnet18": (_timm("resnet18"), 64),
    "timm regnety_002": (_timm("regnety_002"), 64),
    "timm mobilenetv3_small_050": (_timm("mobilenetv3_small_050"), 64),
    "timm efficientnet_b0": (_timm("efficientnet_b0"), 64),
    "timm inception_v3": (_timm("inception_v3"), 96),
    "timm densenet121": (_timm("densenet121"), 64),
    "U-Net": (UNet, 64),
    "torchvision RetinaNet head": (_retina_head, 32),
    "the same, norms per level": (lambda: SharedHead(None), 32),
}
