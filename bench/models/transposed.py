"""Networks with transposed convolutions and batch norms: a U-Net, a GAN's two networks.

Sources, both written from their descriptions: Ronneberger et al., "U-Net", MICCAI 2015
(arXiv 1505.04597), with batch norms and padding as is usual now; Radford et al.,
"Unsupervised Representation Learning with Deep Convolutional GANs", ICLR 2016 (1511.06434).
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

__all__ = ["UNet", "dcgan_discriminator", "dcgan_generator"]


def _double_conv(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [
            nn.Conv2d(channels, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """``[N, 3, H, W] -> [N, classes, H, W]``; H and W divisible by 16 for five ``widths``.

    The way up is transposed convolution, batch norm, ReLU, then the skip is concatenated.
    """

    def __init__(
        self, widths: tuple[int, ...] = (64, 128, 256, 512, 1024), classes: int = 21
    ) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            _double_conv(a, b) for a, b in zip((3, *widths), widths, strict=False)
        )
        pairs = list(zip(reversed(widths[1:]), reversed(widths[:-1]), strict=True))
        self.up = nn.ModuleList(
            nn.Sequential(
                nn.ConvTranspose2d(deep, shallow, 2, stride=2),
                nn.BatchNorm2d(shallow),
                nn.ReLU(inplace=True),
            )
            for deep, shallow in pairs
        )
        self.merge = nn.ModuleList(_double_conv(2 * shallow, shallow) for _, shallow in pairs)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else self.pool(x))
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([skips.pop(), up(x)], 1))
        return self.head(x)


def dcgan_generator(latent: int = 100, width: int = 64) -> nn.Module:
    """``[N, latent, 1, 1] -> [N, 3, 64, 64]``, 3.58 M parameters."""
    layers: list[nn.Module] = []
    channels = latent
    for i, factor in enumerate((8, 4, 2, 1)):
        stride, padding = (1, 0) if i == 0 else (2, 1)
        layers += [
            nn.ConvTranspose2d(channels, factor * width, 4, stride, padding, bias=False),
            nn.BatchNorm2d(factor * width),
            nn.ReLU(inplace=True),
        ]
        channels = factor * width
    layers += [nn.ConvTranspose2d(channels, 3, 4, 2, 1, bias=False), nn.Tanh()]
    return nn.Sequential(*layers)


def dcgan_discriminator(widths: tuple[int, ...] = (64, 128, 256, 512)) -> nn.Sequential:
    """``[N, 3, 64, 64] -> [N, 1, 1, 1]``: strided convolutions, batch norms, leaky ReLU."""
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
    for inputs, outputs in itertools.pairwise(widths):
        layers += [
            nn.Conv2d(inputs, outputs, 4, 2, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.LeakyReLU(0.2),
        ]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4))
