"""What many tests use: small layers and models, and how random functions are drawn."""

from __future__ import annotations

import os
from collections.abc import Callable

import hypothesis
import torch
import torch.nn.functional as F
from torch import nn

LAYERS = {
    "conv1d": lambda: nn.Conv1d(4, 6, 3, padding=1),
    "conv2d": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
    "conv2d_grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2),
    "conv2d_depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1),
    "conv2d_same": lambda: nn.Conv2d(4, 6, 4, padding="same", dilation=3),
    "conv2d_valid": lambda: nn.Conv2d(4, 6, (3, 2), padding="valid"),
    "conv3d": lambda: nn.Conv3d(4, 6, 2),
    "conv_transpose1d": lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1),
    "conv_transpose2d": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, bias=False),
    "conv_transpose2d_grouped": lambda: nn.ConvTranspose2d(
        4, 6, 3, stride=(2, 1), output_padding=(1, 0), groups=2
    ),
    "conv_transpose2d_square": lambda: nn.ConvTranspose2d(4, 4, 3),
    "conv_transpose3d": lambda: nn.ConvTranspose3d(4, 6, 2, groups=2),
    "linear": lambda: nn.Linear(4, 6),
}


def spatial_dims(layer: nn.Module) -> int:
    return 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)


def channels(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def example_input(layer: nn.Module, batch: int = 3, **kwargs) -> torch.Tensor:
    return torch.randn(batch, 4, *[8] * spatial_dims(layer), **kwargs)


def spread_statistics(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give batch norms statistics and affine parameters that are not the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                for tensor, low, high in (
                    (m.running_mean, -0.5, 0.5),
                    (m.running_var, 0.5, 2.0),
                    (m.weight, -1.5, 1.5),
                    (m.bias, -0.5, 0.5),
                ):
                    if tensor is not None:
                        tensor.copy_(
                            torch.rand(tensor.shape, generator=generator) * (high - low) + low
                        )
    return module


class ConvBN(nn.Module):
    """A layer, a batch norm of the right rank, ReLU."""

    def __init__(self, layer: nn.Module, affine: bool = True):
        super().__init__()
        self.layer = layer
        kind = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
        self.bn = kind[spatial_dims(layer)](channels(layer), affine=affine)
        spread_statistics(self)
        self.eval()

    def forward(self, x):
        return F.relu(self.bn(self.layer(x)))


class Residual(nn.Module):
    """Two residual blocks with 1x1, grouped and strided convolutions, then a classifier."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(width)
        self.convs = nn.ModuleList()
        self.bns = nn.ModuleList()
        for groups in (1, 4):
            self.convs += [
                nn.Conv2d(width, width, 1, bias=False),
                nn.Conv2d(width, width, 3, padding=1, groups=groups),
            ]
            self.bns += [nn.BatchNorm2d(width), nn.BatchNorm2d(width)]
        self.down = nn.Conv2d(width, 2 * width, 1, stride=2, bias=False)
        self.down_bn = nn.BatchNorm2d(2 * width)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(2 * width, 5)
        spread_statistics(self)
        self.eval()

    def forward(self, x):
        x = self.relu(self.stem_bn(self.stem(x)))
        for i in (0, 2):
            y = self.relu(self.bns[i](self.convs[i](x)))
            y = self.bns[i + 1](self.convs[i + 1](y))
            y += x
            x = self.relu(y)
        x = self.relu(self.down_bn(self.down(x)))
        return self.head(x.mean((2, 3)))

    pairs = 6


class UNet(nn.Module):
    """Two levels, transposed convolutions on the way up, skip connections."""

    def __init__(self, width=4):
        super().__init__()

        def block(i, o):
            return nn.Sequential(
                nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True)
            )

        self.down1, self.down2 = block(3, width), block(width, 2 * width)
        self.up = nn.Sequential(
            nn.ConvTranspose2d(2 * width, width, 2, 2), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.out = block(2 * width, width)
        self.eval()

    def forward(self, x):
        skip = self.down1(x)
        y = self.up(self.down2(F.max_pool2d(skip, 2)))
        return self.out(torch.cat([y, skip], 1))


def freeze(model, *kinds):
    for module in model.modules():
        if isinstance(module, kinds):
            module.requires_grad_(False)
    return model


CONVS = (nn.Conv2d, nn.ConvTranspose2d)


def fuzz(examples: int) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Decorate a test that hypothesis gives its arguments: the same ones in each run.

    ``examples`` are drawn, or as many as ``CONVBN_FUZZ_EXAMPLES`` says; other ones for each number
    in ``CONVBN_FUZZ_SEED``.
    """
    seed = os.environ.get("CONVBN_FUZZ_SEED")
    settings = hypothesis.settings(
        max_examples=int(os.environ.get("CONVBN_FUZZ_EXAMPLES", examples)),
        derandomize=seed is None,
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        # Shrinking takes minutes: not where many are drawn.
        phases=[p for p in hypothesis.Phase if seed is None or p is not hypothesis.Phase.shrink],
    )

    def decorate(test: Callable[[], None]) -> Callable[[], None]:
        test = settings(test)
        return test if seed is None else hypothesis.seed(int(seed))(test)

    return decorate
