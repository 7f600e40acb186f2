"""Convolutional networks for sequences and volumes.

Sources, both written from their descriptions: Wang et al., "Time Series Classification from
Scratch with Deep Neural Networks", IJCNN 2017 (arXiv 1611.06455), its FCN; Tran et al.,
"A Closer Look at Spatiotemporal Convolutions", CVPR 2018 (arXiv 1711.11248), reduced to a
plain stack of 3-D convolutions.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["ConvNet3d", "TimeSeriesFCN"]


class TimeSeriesFCN(nn.Module):
    """``[N, channels, T] -> [N, classes]``: three blocks conv - BN - ReLU, widths 128, 256, 128.

    Kernels are 8, 5 and 3 with "same" padding; an even kernel pads one more on the right.
    """

    def __init__(self, channels: int = 12, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width, kernel in ((128, 8), (256, 5), (128, 3)):
            layers += [
                nn.Conv1d(channels, width, kernel, padding="same"),
                nn.BatchNorm1d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean(2))


class ConvNet3d(nn.Module):
    """``[N, 3, T, H, W] -> [N, classes]``: conv - BN - ReLU, halving all but the first time."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 256), classes: int = 400) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for i, width in enumerate(widths):
            for stride in ((1, 2, 2) if i == 0 else 2, 1):
                layers += [
                    nn.Conv3d(channels, width, 3, stride, padding=1, bias=False),
                    nn.BatchNorm3d(width),
                    nn.ReLU(inplace=True),
                ]
                channels = width
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3, 4)))
