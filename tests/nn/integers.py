"""Models in quantization-aware training that several tests look at, trained for a few steps."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import gradbits as gb
from gradbits.train.models import build_model

IMAGES = {"in_channels": 2, "image_size": (9, 9), "classes": 5}
NAMES = ("mlp", "small_cnn", "resnet20", "mobilenet", "everything")
OPTIONS: dict[str, dict[str, Any]] = {
    "mlp": {"width": 24},
    "small_cnn": {"width": 6},
    "resnet20": {"width": 4, "blocks": 2},
    "mobilenet": {"width": 4, "expansion": 2},
}


class Everything(nn.Module):
    """One of each thing that has an integer form."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 8, 3, padding="same", bias=True), nn.BatchNorm2d(8), nn.ReLU6())
        self.left = nn.Sequential(nn.Conv2d(8, 6, 3, padding=2, dilation=2, groups=2), nn.BatchNorm2d(6, affine=False))
        self.right = nn.Conv2d(8, 6, 1)
        self.pool, self.drop = nn.MaxPool2d(2), nn.Dropout(0.1)
        self.tokens = nn.Linear(12, 7)
        self.head = nn.Linear(7 * 16, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits and an inner value."""
        x = self.stem(x)
        both = torch.cat([self.left(x), F.relu(self.right(x))], dim=1)
        y = self.pool(F.pad(both, (0, 1, 0, 1)))[:, :, :4, :4]
        y = self.drop(y).flatten(2).transpose(1, 2)
        y = torch.relu(self.tokens(y) + self.tokens_again(y))
        return self.head(y.reshape(y.size(0), -1)), both.mean((2, 3))

    def tokens_again(self, y: torch.Tensor) -> torch.Tensor:
        """Return a slice in the shape of the tokens, so that values of two scales are added."""
        return y[:, :, :7]


def fresh(name: str) -> nn.Module:
    """Return a float model."""
    torch.manual_seed(3)
    return Everything() if name == "everything" else build_model(name, IMAGES, OPTIONS[name])


def batch(count: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images and labels."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, 9, 9, generator=rng), torch.arange(count) % 5


def first(y: Any) -> torch.Tensor:
    """Return the logits of an output."""
    value: torch.Tensor = y[0] if isinstance(y, tuple) else y
    return value


@cache
def _trained(name: str, options: tuple[tuple[str, Any], ...]) -> nn.Module:
    model = fresh(name)
    gb.quantize_(model, gb.recipe("qat_int8", **dict(options)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(6):
        x, y = batch(seed=step)
        loss = F.cross_entropy(first(model(x)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def trained(name: str, **options: Any) -> nn.Module:
    """Return a copy of a model trained for a few steps, in evaluation mode."""
    return copy.deepcopy(_trained(name, tuple(sorted(options.items()))))
