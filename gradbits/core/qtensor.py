"""QTensor: integer codes, the scale that gives them meaning, and the grain that the scale follows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from gradbits.core.errors import ArgumentError
from gradbits.core.grain import Grain, PerTensor
from gradbits.core.packing import pack_codes, unpack_codes


@dataclass(frozen=True, kw_only=True)
class QTensor:
    r"""Integers with a scale.

    .. math:: \hat{x} = s\,q \quad\text{or}\quad s\,(q - Z) \quad\text{or}\quad s\,q + o

    Args:
        codes: int8 codes ``q`` in the tensor's shape, or packed bytes (uint8, flat) of them.
        scale: float32 ``s`` in the grain's scale shape; NaN where the input was not finite.
        bits: bits of one code.
        grain: what shares one scale.
        shape: the tensor's shape.
        dtype: dtype of the tensor that was quantized, and of ``dequantize()``.
        zero_point: float32 integers ``Z``, the code of real zero, for grids with an exact zero; else None.
        offset: float32 ``o``, the value of code 0, for affine grids without an exact zero; else None.

    >>> q = QTensor(codes=torch.tensor([-2, 3], dtype=torch.int8), scale=torch.tensor([0.5]), bits=4,
    ...             shape=torch.Size([2]))
    >>> q.dequantize().tolist(), q.pack().codes.tolist(), q.pack().dequantize().tolist()
    ([-1.0, 1.5], [62], [-1.0, 1.5])
    """

    codes: torch.Tensor
    scale: torch.Tensor
    bits: int
    shape: torch.Size
    grain: Grain = PerTensor()
    dtype: torch.dtype = torch.float32
    zero_point: torch.Tensor | None = None
    offset: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.zero_point is not None and self.offset is not None:
            raise ArgumentError("zero_point, offset: give one of the two, not both")

    @property
    def is_packed(self) -> bool:
        """Whether ``codes`` holds packed bytes."""
        return self.codes.dtype == torch.uint8

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points together."""
        parts = (self.codes, self.scale, self.zero_point, self.offset)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)

    def pack(self) -> QTensor:
        """Return the same values with codes stored in 2, 4 or 8 bits each."""
        return self if self.is_packed else replace(self, codes=pack_codes(self.codes, self.bits))

    def unpack(self) -> QTensor:
        """Return the same values with one int8 per code."""
        if not self.is_packed:
            return self
        return replace(self, codes=unpack_codes(self.codes, self.bits, self.shape.numel()).view(self.shape))

    def zero_value(self) -> torch.Tensor | None:
        """Return the value of code 0 in the grain's scale shape, or None where it is exactly 0."""
        return -(self.scale * self.zero_point) if self.zero_point is not None else self.offset

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the values; computed in float32, then cast to ``dtype`` (default: the original dtype)."""
        codes = self.unpack().codes.float()
        if self.zero_point is not None:
            codes -= self.grain.expand(self.zero_point, self.shape)
        values = codes.mul_(self.grain.expand(self.scale, self.shape))
        if self.offset is not None:
            values += self.grain.expand(self.offset, self.shape)
        return values.to(dtype or self.dtype)
