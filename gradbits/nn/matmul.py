"""A matrix product as a module, so that attention products can be quantized."""

from __future__ import annotations

import torch
from torch import nn


class Matmul(nn.Module):
    """``a @ b`` as a layer: ``quantize_`` finds it, ``torch.matmul`` inside a forward it cannot.

    >>> Matmul()(torch.ones(2, 3, 4), torch.ones(2, 4, 5)).shape
    torch.Size([2, 3, 5])
    """

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return ``a`` [..., M, K] times ``b`` [..., K, N]."""
        return a @ b
