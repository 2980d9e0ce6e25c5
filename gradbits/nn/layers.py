"""Quantized linear layers and matrix products, and the quantized class of every float class."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gradbits.core.errors import ArgumentError
from gradbits.nn.bilinear import Bilinear
from gradbits.nn.compiled import call
from gradbits.nn.convolutions import (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvTranspose1d,
    QuantizedConvTranspose2d,
    QuantizedConvTranspose3d,
)
from gradbits.nn.matmul import Matmul
from gradbits.nn.matrix_products import LinearProducts, MatmulProducts
from gradbits.nn.quantized import Quantized, check_size
from gradbits.nn.refuse import refuse_transforms


class QuantizedLinear(Quantized, nn.Linear):
    """``torch.nn.Linear`` with quantized products."""

    float_class = nn.Linear

    def products(self, input_size: tuple[int, ...]) -> Bilinear:
        return LinearProducts(input_size)

    def channels(self, role: str, axis: int) -> int:
        sizes = {"input": self.in_features, "gradient": self.out_features}
        return sizes.get(role, self.weight.shape[axis])

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return ``input`` [..., in_features] times the transposed weight plus the bias."""
        return call(self, input, self.weight, self.bias)

    def compute(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        check_size(self, x, (1,), weight.shape[1], "features")
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        y: torch.Tensor = self.run(rows, weight, bias, tuple(x.shape[1:-1]))
        return y.view(*x.shape[:-1], self.out_features)

    def like_output(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return x.new_empty(*x.shape[:-1], weight.shape[0])


class QuantizedMatmul(Quantized, Matmul):
    """``gradbits.nn.Matmul`` with quantized products."""

    float_class = Matmul

    def products(self, input_size: tuple[int, ...]) -> Bilinear:
        return MatmulProducts()

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return ``a`` [..., M, K] times ``b`` [..., K, N]."""
        return call(self, a, b, None)

    def like_output(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.matmul(x, weight).contiguous()

    def compute(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        a, b = x, weight
        for operand, name in ((a, "a"), (b, "b")):
            refuse_transforms(self.assignment.name, operand)
            if operand.dim() == 0:
                raise ArgumentError(f"{name}: has no axes; a matrix product needs at least one")
        if a.dim() == 1:
            return self.compute(a.unsqueeze(0), b).squeeze(-1 if b.dim() == 1 else -2)
        if b.dim() == 1:
            return self.compute(a, b.unsqueeze(1)).squeeze(-1)
        if a.shape[-1] != b.shape[-2]:
            shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
            raise ArgumentError(f"a, b: shapes {shapes} of layer {self.assignment.name!r} do not fit together")
        lead = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        a, b = (x.expand(*lead, *x.shape[-2:]).reshape(lead.numel(), *x.shape[-2:]) for x in (a, b))
        y: torch.Tensor = self.run(a, b, None, ())
        return y.view(*lead, *y.shape[-2:])


QUANTIZED_CLASSES: dict[type[nn.Module], type[Any]] = {
    c.float_class: c
    for c in (
        QuantizedLinear,
        QuantizedMatmul,
        QuantizedConv1d,
        QuantizedConv2d,
        QuantizedConv3d,
        QuantizedConvTranspose1d,
        QuantizedConvTranspose2d,
        QuantizedConvTranspose3d,
    )
}
