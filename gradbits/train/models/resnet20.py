"""The 20-layer residual network for small images (He et al., "Deep Residual Learning for Image Recognition", 2016)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from gradbits.core.checks import check_integer
from gradbits.nn import norm_relu


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without parameters (option A: subsample, pad the channels with zeros)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride, self.added = stride, out - channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output, [batch, out, height / stride, width / stride]."""
        y = norm_relu(self.bn1, self.conv1(x))
        if self.stride != 1 or self.added:
            before = self.added // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.added - before))
        return norm_relu(self.bn2, self.conv2(y), x)


class ResNet(nn.Module):
    """A stem, three stages of ``blocks`` blocks each (the later two halve the image), pooling and a classifier."""

    def __init__(self, in_channels: int, classes: int, width: int, blocks: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        stages, channels = [], width
        for index in range(3):
            out = width << index
            stage = []
            for block in range(blocks):
                stage.append(Block(channels, out, 2 if index and not block else 1))
                channels = out
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits, [batch, classes]."""
        x = self.stages(norm_relu(self.bn, self.conv(x)))
        return self.head(x.mean(dim=(2, 3)))


def resnet20(*, in_channels: int, classes: int, width: int = 16, blocks: int = 3) -> nn.Module:
    """Return the residual network of ``6 blocks + 2`` layers; the default is ResNet-20 with option A shortcuts.

    Args:
        in_channels: channels of the images.
        classes: outputs.
        width: channels of the first stage; they double at each of the two further ones.
        blocks: residual blocks of a stage.
    """
    check_integer(width, "width", 1)
    check_integer(blocks, "blocks", 1)
    return ResNet(in_channels, classes, width, blocks)
