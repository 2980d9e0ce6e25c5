"""Four convolutions with batch norm: small enough for a minute on a laptop, deep enough that gradients matter."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from gradbits.core.checks import check_integer


def small_cnn(*, in_channels: int, classes: int, width: int = 16) -> nn.Module:
    """Return conv-BN-ReLU four times, global average pooling and a linear classifier; for images from 8 x 8 pixels.

    The widths are ``width``, ``2 width``, ``2 width``, ``4 width``; the second and the fourth convolution halve the
    image.

    Args:
        in_channels: channels of the images.
        classes: outputs.
        width: channels of the first convolution.
    """
    check_integer(width, "width", 1)
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    channels = in_channels
    for index, (out, stride) in enumerate(((width, 1), (2 * width, 2), (2 * width, 1), (4 * width, 2)), start=1):
        modules[f"conv{index}"] = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
        modules[f"bn{index}"] = nn.BatchNorm2d(out)
        modules[f"relu{index}"] = nn.ReLU()
        channels = out
    modules["pool"] = nn.AdaptiveAvgPool2d(1)
    modules["flatten"] = nn.Flatten()
    modules["head"] = nn.Linear(channels, classes)
    return nn.Sequential(modules)
