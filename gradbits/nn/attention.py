"""Scaled dot-product attention as a module that ``quantize_`` finds."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from gradbits.core.checks import check_instance
from gradbits.core.errors import ArgumentError


class ScaledDotProductAttention(nn.Module):
    r"""``torch.nn.functional.scaled_dot_product_attention`` as a layer: ``quantize_`` finds it, the function it cannot.

    .. math:: O = \mathrm{softmax}(\sigma\, Q K^\top)\, V

    Args:
        causal: whether query i sees keys 0 to i only.
        scale: ``σ``; None is one over the root of the width.

    Raises:
        ArgumentError: ``scale`` is not positive and finite.

    >>> x = torch.ones(2, 4, 10, 8)
    >>> ScaledDotProductAttention(causal=True)(x, x, x).shape
    torch.Size([2, 4, 10, 8])
    """

    def __init__(self, *, causal: bool = False, scale: float | None = None) -> None:
        super().__init__()
        check_instance(causal, "causal", bool)
        check_instance(scale, "scale", float, int, None)
        if scale is not None and not 0 < scale < math.inf:
            raise ArgumentError(f"scale={scale!r}: must be positive and finite, or None")
        self.causal, self.scale = causal, scale

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return [..., L, V] for [..., L, E], [..., S, E] and [..., S, V]; leading axes are batches and heads."""
        return F.scaled_dot_product_attention(query, key, value, is_causal=self.causal, scale=self.scale)

    def extra_repr(self) -> str:
        """Return what the module was given."""
        return f"causal={self.causal}, scale={self.scale}"
