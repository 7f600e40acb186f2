"""RepVGG in its training form: three parallel branches with a batch norm each.

Source: Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021
(arXiv 2101.03697), table 2, written from its description. Every block computes

    ReLU( BN(conv3x3(x)) + BN(conv1x1(x)) + BN(x) )        the last term only if shapes agree

so that two thirds of its batch norms follow a convolution and the rest follow nothing.
RepVGG-A0 has 9.11 M parameters in this form.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["RepVGG", "repvgg_a0", "repvgg_b0"]


class _Block(nn.Module):
    """``[N, inputs, H, W] -> [N, outputs, H / stride, W / stride]``."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.wide = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs)
        )
        self.narrow = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )
        keeps_shape = stride == 1 and inputs == outputs
        self.identity = nn.BatchNorm2d(inputs) if keeps_shape else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(x) + self.narrow(x)
        if self.identity is not None:
            y = y + self.identity(x)
        return torch.relu(y)


class RepVGG(nn.Module):
    """``[N, 3, H, W] -> [N, classes]``; ``widths`` and ``depths`` of the four stages.

    With ``features_only`` it returns the outputs of the four stages instead, as detectors
    want them; there is no classifier then.
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        depths: tuple[int, ...] = (2, 4, 14, 1),
        *,
        classes: int = 1000,
        features_only: bool = False,
    ) -> None:
        super().__init__()
        channels = min(64, widths[0])
        self.stem = _Block(3, channels, 2)
        self.stages = nn.ModuleList()
        for width, depth in zip(widths, depths, strict=True):
            blocks = nn.Sequential()
            for block in range(depth):
                blocks.append(_Block(channels, width, 2 if block == 0 else 1))
                channels = width
            self.stages.append(blocks)
        self.fc = None if features_only else nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        x = self.stem(x)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features if self.fc is None else self.fc(x.mean((2, 3)))


def repvgg_a0(*, features_only: bool = False) -> RepVGG:
    """RepVGG-A0, width multipliers a = 0.75 and b = 2.5."""
    return RepVGG((48, 96, 192, 1280), features_only=features_only)


def repvgg_b0(*, features_only: bool = False) -> RepVGG:
    """RepVGG-B0, width multipliers a = 1 and b = 2.5, and deeper stages."""
    return RepVGG((64, 128, 256, 1280), (4, 6, 16, 1), features_only=features_only)
