"""A multilayer perceptron."""

from __future__ import annotations

from torch import nn

from gradbits.core.checks import check_integer


def mlp(*, in_channels: int, image_size: tuple[int, int], classes: int, width: int = 256, layers: int = 3) -> nn.Module:
    """Return linear layers with ReLU between them, on flattened images.

    Args:
        in_channels, image_size: of the images.
        classes: outputs.
        width: units of a hidden layer.
        layers: linear layers, the classifier included.
    """
    check_integer(width, "width", 1)
    check_integer(layers, "layers", 1)
    features = in_channels * image_size[0] * image_size[1]
    modules: list[nn.Module] = [nn.Flatten()]
    for _ in range(layers - 1):
        modules += [nn.Linear(features, width), nn.ReLU()]
        features = width
    return nn.Sequential(*modules, nn.Linear(features, classes))
