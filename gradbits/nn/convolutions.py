"""Quantized convolutions, plain and transposed, of 1, 2 and 3 dimensions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gradbits.core.errors import ArgumentError
from gradbits.kernels.geometry import FORMATS
from gradbits.nn.bilinear import Bilinear
from gradbits.nn.compiled import call
from gradbits.nn.conv_products import conv_products
from gradbits.nn.quantized import Quantized, check_size


class _QuantizedConv(Quantized):
    """Shared by the convolutions of 1, 2 and 3 dimensions."""

    def products(self, input_size: tuple[int, ...]) -> Bilinear:
        layer: Any = self
        padding = (0,) * len(input_size) if isinstance(layer.padding, str) else tuple(layer.padding)
        if layer.padding_mode != "zeros":
            padding = (0,) * len(input_size)
        if layer.padding == "same" and layer.padding_mode == "zeros":
            low, high = _same_padding(layer)
            padding = low if low == high else (0,) * len(input_size)
        kernel = tuple(layer.kernel_size)
        return conv_products(
            tuple(layer.stride), padding, tuple(layer.dilation), layer.groups, input_size, kernel, transposed=False
        )

    def channels(self, role: str, axis: int) -> int:
        layer: Any = self
        sizes = {"input": layer.in_channels, "gradient": layer.out_channels}
        return int(sizes.get(role, layer.weight.shape[axis]))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the convolution of ``input`` [N, C, *] or [C, *]."""
        layer: Any = self
        return call(self, input, layer.weight, layer.bias)

    def like_output(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        layer: Any = self
        return _in_format_of(layer._conv_forward(x, weight.to(x.dtype), None), x, weight)

    def compute(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        layer: Any = self
        input = x
        spatial = len(layer.kernel_size)
        check_size(self, input, (spatial + 1, spatial + 2), layer.in_channels, "channels")
        x = input if input.dim() == spatial + 2 else input.unsqueeze(0)
        if layer.padding_mode != "zeros":
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        elif layer.padding == "same":
            low, high = _same_padding(layer)
            if low != high:  # an even kernel pads one more at the end, as PyTorch does
                x = F.pad(x, [n for pair in zip(reversed(low), reversed(high), strict=True) for n in pair])
        size = tuple(x.shape[2:])
        products: Any = self.products(size)
        if min(products.geometry.output_size) < 1:
            raise ArgumentError(
                f"input: padded spatial size {size} of layer {self.assignment.name!r} is smaller than its kernel "
                f"{tuple(layer.kernel_size)} with dilation {tuple(layer.dilation)}"
            )
        y = self.run(x, weight, bias, size)
        return _in_format_of(y if input.dim() == spatial + 2 else y.squeeze(0), input, weight)


def _same_padding(layer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)


def _in_format_of(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return ``y`` channels-last where PyTorch's own convolution would, contiguous otherwise.

    Kernels may prefer one order, but a caller's ``view`` must go on working.
    """
    wanted = FORMATS.get(x.dim())
    if wanted is not None and any(
        t.is_contiguous(memory_format=wanted) and not t.is_contiguous() for t in (x, weight) if t.dim() == x.dim()
    ):
        return y.contiguous(memory_format=wanted)
    return y.contiguous()


class QuantizedConv1d(_QuantizedConv, nn.Conv1d):
    """``torch.nn.Conv1d`` with quantized products."""

    float_class = nn.Conv1d


class QuantizedConv2d(_QuantizedConv, nn.Conv2d):
    """``torch.nn.Conv2d`` with quantized products."""

    float_class = nn.Conv2d


class QuantizedConv3d(_QuantizedConv, nn.Conv3d):
    """``torch.nn.Conv3d`` with quantized products."""

    float_class = nn.Conv3d


class _QuantizedConvTranspose(Quantized):
    """Shared by the transposed convolutions; each is the ``grad_input`` of a plain one."""

    def products(self, input_size: tuple[int, ...]) -> Bilinear:
        layer: Any = self
        padding, kernel = tuple(layer.padding), tuple(layer.kernel_size)
        return conv_products(
            tuple(layer.stride), padding, tuple(layer.dilation), layer.groups, input_size, kernel, transposed=True
        )

    def channels(self, role: str, axis: int) -> int:
        layer: Any = self
        sizes = {"input": layer.in_channels, "gradient": layer.out_channels}
        return int(sizes.get(role, layer.weight.shape[1 - axis]))

    @torch.compiler.disable(recursive=True)
    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        """Return the transposed convolution of ``input`` [N, C, *] or [C, *]."""
        layer: Any = self
        spatial = len(layer.kernel_size)
        check_size(self, input, (spatial + 1, spatial + 2), layer.in_channels, "channels")
        x = input if input.dim() == spatial + 2 else input.unsqueeze(0)
        extra = layer._output_padding(
            input, output_size, layer.stride, layer.padding, layer.kernel_size, spatial, layer.dilation
        )
        size = tuple(
            (n - 1) * s - 2 * p + d * (k - 1) + e + 1
            for n, s, p, d, k, e in zip(
                x.shape[2:], layer.stride, layer.padding, layer.dilation, layer.kernel_size, extra, strict=True
            )
        )
        if min(size) < 1:
            raise ArgumentError(f"input: layer {self.assignment.name!r} would give the spatial size {size}")
        y = self.run(x, layer.weight, layer.bias, size)
        return _in_format_of(y if input.dim() == spatial + 2 else y.squeeze(0), input, layer.weight)


class QuantizedConvTranspose1d(_QuantizedConvTranspose, nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` with quantized products."""

    float_class = nn.ConvTranspose1d


class QuantizedConvTranspose2d(_QuantizedConvTranspose, nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` with quantized products."""

    float_class = nn.ConvTranspose2d


class QuantizedConvTranspose3d(_QuantizedConvTranspose, nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d`` with quantized products."""

    float_class = nn.ConvTranspose3d
