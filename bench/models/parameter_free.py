"""Networks with parameter-free spatial layers: R50-max, R50-hybrid, ViT-S-max, PiT-S-max.

Source: Han et al., "Learning Features with Parameter-Free Layers", ICLR 2022
(arXiv 2202.02777), written from its description. The paper's table gives 25.6 M parameters
for R50, 14.2 M for R50-max and 17.3 M for R50-hybrid at 1000 classes.

The *efficient bottleneck* is ResNet's bottleneck with a 3x3 max-pool where the 3x3
convolution and its batch norm were:

    1x1 conv - BN - ReLU - 3x3 max-pool - 1x1 conv - BN - (+ shortcut) - ReLU

R50-max uses it in every block. R50-hybrid keeps the 3x3 convolution in the blocks that reduce
the resolution. The *efficient transformer* mixes the tokens of every second block by
max-pooling widened features instead of by self-attention. It has layer norms only: ViT-S-max
and PiT-S-max are controls, networks in which a conv-BN pass must find nothing and cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "BottleneckNet",
    "PooledTransformer",
    "pit_s_max",
    "resnet50",
    "resnet50_hybrid",
    "resnet50_max",
    "vit_s_max",
]

Spatial = Literal["conv", "max"]


def _conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class _Bottleneck(nn.Module):
    """``[N, inputs, H, W] -> [N, 4 * width, H / stride, W / stride]``."""

    def __init__(self, inputs: int, width: int, stride: int, spatial: Spatial) -> None:
        super().__init__()
        layers = [*_conv_bn(inputs, width, 1), nn.ReLU(inplace=True)]
        if spatial == "conv":
            layers += [*_conv_bn(width, width, 3, stride), nn.ReLU(inplace=True)]
        else:
            layers += [nn.MaxPool2d(3, stride, padding=1)]
        layers += _conv_bn(width, 4 * width, 1)
        self.residual = nn.Sequential(*layers)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != 4 * width:
            self.shortcut = nn.Sequential(*_conv_bn(inputs, 4 * width, 1, stride))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.residual(x) + self.shortcut(x))


class BottleneckNet(nn.Module):
    """ResNet-50's plan with a choice of the spatial layer: ``[N, 3, H, W] -> [N, classes]``.

    ``spatial(stride)`` says which one a block of that stride gets.
    """

    def __init__(self, spatial: Callable[[int], Spatial], classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *_conv_bn(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)
        )
        self.stages = nn.Sequential()
        channels = 64
        for stage, blocks in enumerate((3, 4, 6, 3)):
            width = 64 * 2**stage
            layers = nn.Sequential()
            for block in range(blocks):
                stride = 2 if block == 0 and stage > 0 else 1
                layers.append(_Bottleneck(channels, width, stride, spatial(stride)))
                channels = 4 * width
            self.stages.append(layers)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stages(self.stem(x)).mean((2, 3)))


def resnet50() -> nn.Module:
    """R50, 25.6 M parameters: the baseline of the paper's table."""
    return BottleneckNet(lambda stride: "conv")


def resnet50_max() -> nn.Module:
    """R50-max, 14.2 M parameters: max-pool in every block."""
    return BottleneckNet(lambda stride: "max")


def resnet50_hybrid() -> nn.Module:
    """R50-hybrid, 17.3 M parameters: 3x3 convolutions where the resolution is reduced."""
    return BottleneckNet(lambda stride: "conv" if stride > 1 else "max")


class _Attention(nn.Module):
    """Multi-head self-attention over a grid of tokens ``[N, H, W, C]``."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.project(mixed.transpose(1, 2).reshape(x.shape))


class _PooledMixing(nn.Module):
    """Token mixing by a 3x3 max-pool over features widened three times, ``[N, H, W, C]``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.widen = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(3 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        wide = F.gelu(self.widen(x)).permute(0, 3, 1, 2)
        pooled = F.max_pool2d(wide, 3, stride=1, padding=1)
        return self.project(F.gelu(pooled.permute(0, 2, 3, 1)))


class _TransformerBlock(nn.Module):
    def __init__(self, dim: int, mixing: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.mixing = mixing
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixing(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Downsample(nn.Module):
    """PiT's pooling between stages: a strided convolution, one group per input channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PooledTransformer(nn.Module):
    """Vision transformer, every second block of which pools: ``[N, 3, 224, 224] -> [N, classes]``.

    Args:
        dims, depths, heads: per stage; between stages the resolution halves and the width doubles.
        stride: of the embedding of 16x16 patches.
    """

    def __init__(
        self,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        heads: tuple[int, ...],
        stride: int,
        classes: int = 1000,
        image: int = 224,
    ) -> None:
        super().__init__()
        grid = (image - 16) // stride + 1
        self.embed = nn.Conv2d(3, dims[0], 16, stride)
        self.position = nn.Parameter(torch.randn(1, grid, grid, dims[0]) * 0.02)
        self.stages = nn.Sequential()
        for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            if stage > 0:
                self.stages.append(_Downsample(dims[stage - 1]))
            for block in range(depth):
                pools = block % 2 == 1
                mixing = _PooledMixing(dim) if pools else _Attention(dim, heads[stage])
                self.stages.append(_TransformerBlock(dim, mixing))
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.fc = nn.Linear(dims[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).permute(0, 2, 3, 1) + self.position
        return self.fc(self.norm(self.stages(tokens)).mean((1, 2)))


def vit_s_max() -> nn.Module:
    """ViT-S-max: DeiT-S's plan (width 384, 12 blocks, 6 heads) with pooling in every second."""
    return PooledTransformer((384,), (12,), (6,), stride=16)


def pit_s_max() -> nn.Module:
    """PiT-S-max: PiT-S's plan (widths 144 to 576, 2+6+4 blocks) with pooling in every second."""
    return PooledTransformer((144, 288, 576), (2, 6, 4), (3, 6, 12), stride=8)
