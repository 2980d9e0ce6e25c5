"""QTensor: integer codes, the scale that gives them meaning, and the grain that the scale follows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from gradbits.core.errors import ArgumentError
from gradbits.core.grain import Grain, PerRow, PerTensor
from gradbits.core.packing import pack_codes, unpack_codes


class Rotation(Protocol):
    """An invertible linear map along one axis of a tensor, found for that tensor: what was applied before the grid.

    Implementations are frozen dataclasses whose tensors are fields.
    """

    @property
    def axis(self) -> int:
        """The axis it mixes."""

    @property
    def orthogonal(self) -> bool:
        """Whether its inverse is its transpose, so that it cancels in a sum over the axis."""

    def along(self, axis: int) -> Rotation:
        """Return the same map along another axis."""

    def of_group(self, group: int) -> Rotation:
        """Return the same map where ``group`` consecutive entries along the axis make one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rotated ``x``."""

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        """Undo ``forward``."""

    def column_norms(self, x: torch.Tensor) -> torch.Tensor:
        """Return the squared norm of each column of the inverse, to broadcast against ``x``: noise grows by it."""


@dataclass(frozen=True, kw_only=True)
class QTensor:
    r"""Integers with a scale.

    .. math:: \hat{x} = s\,q \quad\text{or}\quad s\,(q - Z) \quad\text{or}\quad s\,q + o

    A rotated tensor is :math:`T^{-1}\hat{x}`; one of several digits is the sum :math:`\hat{x} + \text{rest}`.

    Args:
        codes: int8 codes ``q`` in the tensor's shape, or packed bytes (uint8, flat) of them.
        scale: float32 ``s`` in the grain's scale shape; NaN where the input was not finite.
        bits: bits of one code.
        grain: what shares one scale.
        shape: the tensor's shape.
        dtype: dtype of the tensor that was quantized, and of ``dequantize()``.
        zero_point: float32 integers ``Z``, the code of real zero, for grids with an exact zero; else None.
        offset: float32 ``o``, the value of code 0, for affine grids without an exact zero; else None.
        rest: the digits below this one, in the same shape and rotation, or None.
        rotation: what turned the values before they became codes, or None.

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
    rest: QTensor | None = None
    rotation: Rotation | None = None

    def __post_init__(self) -> None:
        if self.zero_point is not None and self.offset is not None:
            raise ArgumentError("zero_point, offset: give one of the two, not both")

    @property
    def is_packed(self) -> bool:
        """Whether ``codes`` holds packed bytes."""
        return self.codes.dtype == torch.uint8

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zero points, lower digits and the rotation's tensors together."""
        turned = [] if self.rotation is None else list(vars(self.rotation).values())
        parts: list[Any] = [self.codes, self.scale, self.zero_point, self.offset, *turned]
        own = sum(t.numel() * t.element_size() for t in parts if isinstance(t, torch.Tensor))
        return own + (0 if self.rest is None else self.rest.nbytes)

    def pack(self) -> QTensor:
        """Return the same values with codes stored in 2, 4 or 8 bits each."""
        if self.is_packed:
            return self
        rest = None if self.rest is None else self.rest.pack()
        return replace(self, codes=pack_codes(self.codes, self.bits), rest=rest)

    def unpack(self) -> QTensor:
        """Return the same values with one int8 per code."""
        if not self.is_packed:
            return self
        codes = unpack_codes(self.codes, self.bits, self.shape.numel()).view(self.shape)
        return replace(self, codes=codes, rest=None if self.rest is None else self.rest.unpack())

    def digits(self) -> tuple[QTensor, ...]:
        """Return the digits from the highest to the lowest, each a QTensor of its own."""
        own = self if self.rest is None else replace(self, rest=None)
        return (own,) if self.rest is None else (own, *self.rest.digits())

    def select(self, rows: torch.Tensor, factor: torch.Tensor | float = 1.0) -> QTensor:
        """Return the rows (entries along axis 0) of index ``rows`` times ``factor``; a rotation along rows is dropped.

        Args:
            rows: int64 indices.
            factor: a number, or one for each selected row.

        >>> q = QTensor(codes=torch.tensor([[1], [2], [3]], dtype=torch.int8), scale=torch.ones(1, 1), bits=4,
        ...             shape=torch.Size([3, 1]))
        >>> q.select(torch.tensor([0, 2]), torch.tensor([1.0, 10.0])).dequantize().tolist()
        [[1.0], [30.0]]
        """
        codes = self.unpack().codes.index_select(0, rows)
        by_row = isinstance(factor, torch.Tensor)
        if isinstance(factor, torch.Tensor):
            factor = factor.view(-1, *(1,) * (len(self.shape) - 1))

        def pick(value: torch.Tensor | None, times: torch.Tensor | float) -> torch.Tensor | None:
            if value is None:
                return None
            return (value.index_select(0, rows) if value.shape[0] > 1 else value) * times

        scale = pick(self.scale, factor)
        assert scale is not None
        grain = PerRow() if by_row and isinstance(self.grain, PerTensor) else self.grain
        turned = self.rotation if self.rotation is not None and self.rotation.axis != 0 else None
        return replace(
            self,
            codes=codes,
            scale=scale,
            shape=codes.shape,
            grain=grain,
            zero_point=pick(self.zero_point, 1.0),
            offset=pick(self.offset, factor),
            rest=None if self.rest is None else self.rest.select(rows, factor),
            rotation=turned,
        )

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
        if self.rest is not None:
            values += replace(self.rest, rotation=None).dequantize(torch.float32)
        if self.rotation is not None:
            values = self.rotation.inverse(values)
        return values.to(dtype or self.dtype)
