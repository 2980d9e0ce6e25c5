"""Integer-only inference: the operations between the first quantization and the last dequantization, without floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gradbits.core.errors import ArgumentError
from gradbits.kernels import reference
from gradbits.kernels.fixed_point import Multiplier, requantize, rounding_shift
from gradbits.kernels.geometry import ConvGeometry, channels_first, channels_last
from gradbits.nn.integer_state import Numbered

PIECE = 1 << 18  # output elements of the samples that are worked on at once


@dataclass(frozen=True)
class Codes:
    """What the codes of a value mean: :math:`r = S(q - Z)`.

    Args:
        scale: ``S``.
        zero: ``Z``.
        low, high: the lowest and the highest code.
    """

    scale: float
    zero: int
    low: int
    high: int


class Quantize(Numbered):
    r"""Codes of a float input, :math:`q = \mathrm{clamp}(\mathrm{round}(x\,r) + Z)` with the float32 reciprocal r."""

    numbers = ("codes",)
    inverse: torch.Tensor

    def __init__(self, codes: Codes, inverse: torch.Tensor) -> None:
        super().__init__()
        self.codes = codes
        self.register_buffer("inverse", inverse.reshape(()).to(torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return int8 codes."""
        rounded = torch.round(x.to(torch.float32) * self.inverse)
        return (rounded + self.codes.zero).clamp(self.codes.low, self.codes.high).to(torch.int8)

    def extra_repr(self) -> str:
        return str(self.codes)


class Dequantize(Numbered):
    """Floats of codes, or of the sums of a last layer."""

    numbers = ("zero",)
    scale: torch.Tensor

    def __init__(self, scale: torch.Tensor, zero: int = 0) -> None:
        super().__init__()
        self.zero = zero
        self.register_buffer("scale", scale)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """Return float32 values."""
        return (codes.to(torch.int32) - self.zero).to(torch.float32) * self.scale

    def extra_repr(self) -> str:
        return f"zero={self.zero}, scales={self.scale.numel()}"


@dataclass(frozen=True)
class Shape:
    """The form of a layer: a matrix product, or a convolution of 1 to 3 dimensions.

    Args:
        stride, dilation: one integer per spatial dimension; empty for a matrix product.
        padding: (before, after) of each spatial dimension.
        groups: of the convolution.
        normed: whether a batch norm is folded in, so that the outputs must lie along axis 1.
    """

    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    normed: bool = False

    @property
    def spatial(self) -> int:
        """Number of spatial dimensions."""
        return len(self.stride)


class IntegerLayer(Numbered):
    r"""A linear layer or convolution on int8 codes with int32 sums, its batch norm and activation included.

    .. math:: a = b + \sum (q_x - Z_x)\,q_w, \qquad q = \mathrm{clamp}(\mathrm{round}(M a) + Z)

    Args:
        weight: int8 codes [Co, ...].
        steps: float64 [Co], what one step of a weight is worth; inference does not use it, other formats ask for it.
        bias: int32 [Co] at the scale of the sums.
        shape: what kind of layer it is.
        zero: ``Z_x``.
        codes: of the output; None for a last layer, whose sums are the result.
        multiplier: ``M`` for each output channel; None for a last layer.
        bounds: int32 [Co] each: lowest and highest sum of a last layer with an activation.
        rounding: see ``requantize``.
        compute: ``"simulate"`` adds up in float64, everything else in int32.
    """

    numbers = ("zero", "codes", "rounding")
    weight: torch.Tensor
    steps: torch.Tensor
    bias: torch.Tensor
    offset: torch.Tensor
    m0: torch.Tensor
    shift: torch.Tensor
    least: torch.Tensor | None
    most: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        steps: torch.Tensor,
        bias: torch.Tensor,
        shape: Shape,
        zero: int,
        codes: Codes | None,
        multiplier: Multiplier | None,
        bounds: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
        rounding: str = "single",
        compute: str = "auto",
    ) -> None:
        super().__init__()
        self.shape, self.zero, self.codes = shape, zero, codes
        self.rounding, self.compute = rounding, compute
        self.register_buffer("weight", weight)
        self.register_buffer("steps", steps)
        self.register_buffer("bias", bias)
        # the codes' zero point leaves the sum: what it adds is the same for every position
        self.register_buffer("offset", bias - zero * weight.flatten(1).sum(1, dtype=torch.int32))
        self.register_buffer("m0", None if multiplier is None else multiplier.m0)
        self.register_buffer("shift", None if multiplier is None else multiplier.shift)
        self.register_buffer("least", bounds[0])
        self.register_buffer("most", bounds[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return int8 codes, or the int32 sums of a last layer."""
        self._check(x)
        if self.shape.spatial:
            x = self._padded(channels_last(x))
        if torch.compiler.is_exporting():
            y = self._finish(self._sums(x))
        else:
            each = max(1, self.weight.shape[0] * x.shape[1:-1].numel())
            pieces = x.split(max(1, PIECE // each)) if x.dim() > 1 else (x,)
            parts = [self._finish(self._sums(piece)) for piece in pieces]
            y = torch.cat(parts) if len(parts) > 1 else parts[0]
        return channels_first(y) if self.shape.spatial else y

    def _check(self, x: torch.Tensor) -> None:
        """Refuse a shape that the layer does not take: kernels trust the sizes they are given."""
        spatial = self.shape.spatial
        channels = self.weight.shape[1] * self.shape.groups
        exact = bool(spatial) or self.shape.normed
        fits = x.dim() == spatial + 2 if exact else x.dim() > 0
        if not fits or x.shape[1 if spatial else -1] != channels:
            axes = f"{spatial + 2} axes and " if exact else ""
            what = f"{axes}{channels} {'channels' if spatial else 'features'}"
            raise ArgumentError(f"input: shape {tuple(x.shape)} does not fit a layer; must have {what}")

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        """Return channels-last codes with the code of zero around them."""
        pads = [n for pair in reversed(self.shape.padding) for n in pair]
        return F.pad(x, [0, 0, *pads], value=self.zero) if any(pads) else x

    def _finish(self, sums: torch.Tensor) -> torch.Tensor:
        """Return the result of sums [..., Co]."""
        sums = sums + self.offset
        if self.codes is None:
            return sums if self.least is None and self.most is None else sums.clamp(self.least, self.most)
        scaled = requantize(sums, Multiplier(self.m0, self.shift), self.rounding)
        return scaled.add_(self.codes.zero).clamp_(self.codes.low, self.codes.high).to(torch.int8)

    def _sums(self, x: torch.Tensor) -> torch.Tensor:
        """Return the exact sums of products [..., Co] for codes [..., K] or [N, *spatial, Ci]."""
        w, s = self.weight, self.shape
        if self.compute == "simulate":
            wide = x.double()
            if not s.spatial:
                return F.linear(wide, w.double()).to(torch.int32)
            zeros = (0,) * s.spatial
            y = torch.convolution(
                wide.movedim(-1, 1), w.double(), None, s.stride, zeros, s.dilation, False, zeros, s.groups
            )
            return y.movedim(1, -1).to(torch.int32)
        if not s.spatial:
            rows = x.reshape(-1, x.shape[-1])
            product = torch._int_mm if torch.compiler.is_exporting() else reference.int_product
            return product(rows, w.t()).reshape(*x.shape[:-1], w.shape[0])
        if torch.compiler.is_exporting():
            return _patch_sums(x, w, s)
        size = tuple(x.shape[1:-1])
        geometry = ConvGeometry(s.stride, (0,) * s.spatial, s.dilation, s.groups, size, tuple(w.shape[2:]))
        return reference.conv_sum(x, w, geometry)

    def extra_repr(self) -> str:
        kind = f"{self.shape.spatial}-d convolution" if self.shape.spatial else "matrix product"
        return f"{kind}, weight={list(self.weight.shape)}, codes={self.codes}"


def _patch_sums(x: torch.Tensor, w: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Return a convolution's sums with few operations of any size of batch, for an exported program."""
    for axis, (k, d, s) in enumerate(zip(w.shape[2:], shape.dilation, shape.stride, strict=True), start=1):
        x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
    g, co = shape.groups, w.shape[0] // shape.groups
    spatial = x.shape[1 : 1 + shape.spatial]
    taps = w[:1].numel()
    if g == 1:
        sums = torch._int_mm(x.reshape(x.shape[0] * spatial.numel(), taps), w.flatten(1).t().contiguous())
    else:  # [rows, groups, 1, taps] times [groups, channels of each, taps]
        rows = x.reshape(x.shape[0] * spatial.numel(), g, 1, taps).to(torch.int32)
        sums = (rows * w.reshape(g, co, taps).to(torch.int32)).sum(-1, dtype=torch.int32)
    return sums.reshape(x.shape[0], *spatial, w.shape[0])


class IntegerSum(Numbered):
    r"""The sum of values of several scales, rounded once, :math:`q = Z + \mathrm{round}(2^{-s}\sum m_i(q_i - Z_i))`."""

    numbers = ("zeros", "factors", "shift", "codes")

    def __init__(self, zeros: tuple[int, ...], factors: tuple[int, ...], shift: int, codes: Codes) -> None:
        super().__init__()
        self.zeros, self.factors, self.shift, self.codes = zeros, factors, shift, codes

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        """Return int8 codes."""
        total: Any = 0
        for value, zero, factor in zip(values, self.zeros, self.factors, strict=True):
            total = total + (value.to(torch.int64) - zero) * factor
        scaled = rounding_shift(total, self.shift)
        return (scaled + self.codes.zero).clamp(self.codes.low, self.codes.high).to(torch.int8)

    def extra_repr(self) -> str:
        return f"zeros={self.zeros}, factors={self.factors}, shift={self.shift}, codes={self.codes}"


class IntegerCat(nn.Module):
    """The concatenation of values, each rescaled to the scale of the result."""

    def __init__(self, parts: list[IntegerSum], axis: int) -> None:
        super().__init__()
        self.parts, self.axis = nn.ModuleList(parts), axis

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        """Return int8 codes."""
        return torch.cat([part(value) for part, value in zip(self.parts, values, strict=True)], dim=self.axis)


class IntegerMean(Numbered):
    r"""The mean over axes or windows: :math:`q = Z + \mathrm{round}(M_0 \sum(q_x - Z_x) / (2^{31+n} \cdot count))`.

    Args:
        zero: ``Z_x``.
        multiplier: M0 and n of the input's scale over the output's.
        codes: of the output.
        axes: averaged axes; or None for windows.
        keep: whether averaged axes stay with size 1.
        window, stride: of a 2-d average pooling.
    """

    numbers = ("zero", "multiplier", "codes")

    def __init__(
        self,
        zero: int,
        multiplier: tuple[int, int],
        codes: Codes,
        axes: tuple[int, ...] | None,
        keep: bool = True,
        window: tuple[int, int] = (1, 1),
        stride: tuple[int, int] = (1, 1),
    ) -> None:
        super().__init__()
        self.zero, self.multiplier, self.codes = zero, multiplier, codes
        self.axes, self.keep, self.window, self.stride = axes, keep, window, stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return int8 codes."""
        axes, keep = self.axes, self.keep
        if axes is None:
            x = x.unfold(2, self.window[0], self.stride[0]).unfold(3, self.window[1], self.stride[1])
            axes, keep = (-2, -1), False
        count = 1
        for axis in axes:
            count = count * x.shape[axis]
        total = x.sum(axes, keepdim=keep, dtype=torch.int32).to(torch.int64) - self.zero * count
        m0, shift = self.multiplier
        divisor = count * (1 << (31 + shift))
        # halves away from zero: the divisor is even, and division drops what is left towards zero
        product = total * m0
        scaled = torch.div(product + torch.sign(product) * (divisor // 2), divisor, rounding_mode="trunc")
        return (scaled + self.codes.zero).clamp(self.codes.low, self.codes.high).to(torch.int8)

    def extra_repr(self) -> str:
        where = f"window={self.window}, stride={self.stride}" if self.axes is None else f"axes={self.axes}"
        return f"{where}, codes={self.codes}"


class Clamp(Numbered):
    """An activation that stands alone: codes between bounds."""

    numbers = ("low", "high")

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the codes within the bounds."""
        return x.clamp(self.low, self.high)
