"""A small MobileNetV2 (Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018)."""

from __future__ import annotations

import torch
from torch import nn

from gradbits.core.checks import check_integer

# (channels over width, blocks, stride of the first)
STAGES = ((1, 1, 1), (2, 2, 2), (4, 2, 2))


def _conv(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, out, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out),
    ]


class InvertedResidual(nn.Module):
    """Expand the channels, filter each by itself, project; a shortcut where shapes agree."""

    def __init__(self, channels: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.layers = nn.Sequential(
            *([*_conv(channels, inner, 1), nn.ReLU6()] if expansion > 1 else []),
            *_conv(inner, inner, 3, stride, groups=inner),
            nn.ReLU6(),
            *_conv(inner, out, 1),
        )
        self.has_shortcut = stride == 1 and channels == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output, [batch, out, height / stride, width / stride]."""
        return x + self.layers(x) if self.has_shortcut else self.layers(x)


class MobileNet(nn.Module):
    """A stem, stages of inverted residual blocks, a wide 1 x 1 convolution, pooling and a classifier."""

    def __init__(self, in_channels: int, classes: int, width: int, expansion: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv(in_channels, width, 3), nn.ReLU6())
        blocks, channels = [], width
        for factor, count, stride in STAGES:
            for index in range(count):
                blocks.append(InvertedResidual(channels, factor * width, stride if not index else 1, expansion))
                channels = factor * width
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Sequential(*_conv(channels, 2 * channels, 1), nn.ReLU6())
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.head = nn.Linear(2 * channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits, [batch, classes]."""
        return self.head(self.flatten(self.pool(self.last(self.blocks(self.stem(x))))))


def mobilenet(*, in_channels: int, classes: int, width: int = 16, expansion: int = 4) -> nn.Module:
    """Return a network of depthwise convolutions for images from 8 x 8 pixels, which it halves twice.

    Args:
        in_channels: channels of the images.
        classes: outputs.
        width: channels of the first stage; they double at each of the two further ones.
        expansion: channels inside a block over those outside.
    """
    for name, value in (("width", width), ("expansion", expansion)):
        check_integer(value, name, 1)
    return MobileNet(in_channels, classes, width, expansion)
