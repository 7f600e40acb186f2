"""Small models with the block patterns of well-known ones, and inputs for them."""

import torch
import torch.nn.functional as F
from common import spread_statistics
from torch import nn


class Wrapped(nn.Module):
    def __init__(self, mod):
        super().__init__()
        self.mod = mod

    def forward(self, x):
        return self.mod(x)


class PaperM(nn.Module):
    """The model ``M`` of the paper: three blocks across nested and wrapped modules."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 5, 3, bias=False)
        self.nested = nn.Sequential(nn.BatchNorm2d(5), nn.Conv2d(5, 6, 3))
        self.wrapped = Wrapped(nn.BatchNorm2d(6))

    def forward(self, x):
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.conv2(x)
        x = self.nested(x)
        return self.wrapped(x)


class Inside(PaperM):
    """The same blocks, called inside their modules, with activations."""

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = F.relu(self.nested[0](self.conv2(x)))
        return self.wrapped.mod(self.nested[1](x))


def conv_bn(c_in, c_out, kernel=1, act=nn.ReLU, **kwargs):
    layers = [nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False, **kwargs)]
    return nn.Sequential(*layers, nn.BatchNorm2d(c_out), *([] if act is None else [act()]))


class Bottleneck(nn.Module):
    """ResNet's and, with groups and squeeze-excitation, RegNet's."""

    def __init__(self, c_in, width, c_out, stride=1, groups=1, se=False):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, c_out, 1, bias=False), nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.se = SqueezeExcite(width) if se else nn.Identity()
        same = stride == 1 and c_in == c_out
        self.downsample = None if same else conv_bn(c_in, c_out, act=None, stride=stride)

    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.se(out)
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class SqueezeExcite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x):
        return x * self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


class MBConv(nn.Module):
    """MobileNet's and EfficientNet's inverted residual."""

    def __init__(self, channels, act, se=False):
        super().__init__()
        wide = 2 * channels
        self.block = nn.Sequential(
            conv_bn(channels, wide, act=act),
            conv_bn(wide, wide, 3, act=act, groups=wide),
            SqueezeExcite(wide) if se else nn.Identity(),
            conv_bn(wide, channels, act=None),
        )

    def forward(self, x):
        return x + self.block(x)


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = conv_bn(4, 3)
        self.b = nn.Sequential(conv_bn(4, 2), conv_bn(2, 3, 3))
        self.pool = conv_bn(4, 2)

    def forward(self, x):
        return torch.cat([self.a(x), self.b(x), self.pool(F.avg_pool2d(x, 3, 1, 1))], 1)


class Dense(nn.Module):
    """DenseNet: batch norms before convolutions; half of them follow one."""

    def __init__(self):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.conv1(F.relu(self.norm1(x)))
        y = self.conv2(F.relu(self.norm2(y)))
        return torch.cat([x, y], 1)


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1, self.down2 = conv_bn(3, 4, 3), conv_bn(4, 8, 3, stride=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2)
        self.up_bn = nn.BatchNorm2d(4)
        self.out = conv_bn(8, 2, 3)

    def forward(self, x):
        skip = self.down1(x)
        y = F.relu(self.up_bn(self.up(self.down2(skip))))
        return self.out(torch.cat([skip, y], 1))


class RetinaHead(nn.Module):
    """Convolutions shared by all levels, batch norms of their own per level."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.bns = nn.ModuleList(
            nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2)) for _ in range(3)
        )
        self.cls = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x):
        outs = []
        for level in range(3):
            y = F.avg_pool2d(x, 2**level)
            for conv, bn in zip(self.convs, self.bns[level], strict=True):
                y = F.relu(bn(conv(y)), inplace=True)
            outs.append(self.cls(y).flatten(2))
        return torch.cat(outs, 2)


class LeViT(nn.Module):
    """Linear layers over tokens, the batch norm over all rows."""

    def __init__(self):
        super().__init__()
        self.linear, self.bn = nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)
        x = self.linear(x)
        return self.bn(x.flatten(0, 1)).reshape_as(x).relu()


# Name -> (model, pairs, input channels).
MODELS = {
    "paper": (PaperM, 3, 3),
    "inside": (Inside, 3, 3),
    "resnet": (
        lambda: nn.Sequential(conv_bn(3, 4, 3), Bottleneck(4, 4, 8, 2), Bottleneck(8, 4, 8)),
        8,
        3,
    ),
    "regnet": (lambda: nn.Sequential(Bottleneck(4, 6, 8, 2, groups=3, se=True)), 4, 4),
    "mobilenet": (lambda: nn.Sequential(conv_bn(3, 4, 3), MBConv(4, nn.Hardswish)), 4, 3),
    "efficientnet": (lambda: nn.Sequential(MBConv(4, nn.SiLU, se=True)), 3, 4),
    "inception": (Inception, 4, 4),
    "densenet": (Dense, 1, 4),
    "unet": (UNet, 4, 3),
    "retina": (RetinaHead, 6, 4),
    "levit": (LeViT, 1, 4),
}


def make(name):
    """A model in evaluation mode with spread statistics, an input that requires no grad."""
    torch.manual_seed(0)
    build, pairs, channels = MODELS[name]
    return spread_statistics(build()).eval(), torch.randn(2, channels, 12, 12), pairs
