"""The 18-layer residual network, for small images (He et al., "Deep Residual Learning for Image Recognition", 2016)."""

from __future__ import annotations

import torch
from torch import nn

from gradbits.core.checks import check_integer
from gradbits.nn import norm_relu


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut; where shapes change it is a 1 x 1 convolution (option B)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out:
            conv = nn.Conv2d(channels, out, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output, [batch, out, height / stride, width / stride]."""
        y = norm_relu(self.bn1, self.conv1(x))
        return norm_relu(self.bn2, self.conv2(y), self.shortcut(x))


class ResNet(nn.Module):
    """A 3 x 3 stem, four stages of two blocks (the later three halve the image), pooling and a classifier."""

    def __init__(self, in_channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        stages, channels = [], width
        for index in range(4):
            out = width << index
            stages.append(nn.Sequential(Block(channels, out, 2 if index else 1), Block(out, out, 1)))
            channels = out
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits, [batch, classes]."""
        x = self.stages(norm_relu(self.bn, self.conv(x)))
        return self.head(x.mean(dim=(2, 3)))


def resnet18(*, in_channels: int, classes: int, width: int = 64) -> nn.Module:
    """Return ResNet-18 with the stem for images of about 32 x 32 pixels: one 3 x 3 convolution, no pooling.

    Args:
        in_channels: channels of the images.
        classes: outputs.
        width: channels of the first stage; they double at each of the three further ones.
    """
    check_integer(width, "width", 1)
    return ResNet(in_channels, classes, width)
