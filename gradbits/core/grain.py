"""Grains: which elements share one scale."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from gradbits.core.checks import check_axis, check_integer
from gradbits.core.errors import ArgumentError, DtypeError
from gradbits.core.spec import Spec


@dataclass(frozen=True, kw_only=True)
class Grain(Spec):
    """What shares one scale; the base of the four grains."""

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """Return a view or padded copy of ``x`` as [groups..., elements] for reductions over the last axis."""
        raise NotImplementedError

    def scale_shape(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the scale of a tensor of shape ``shape``."""
        raise NotImplementedError

    def expand(self, scale: torch.Tensor, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
        """Return ``scale`` in a shape that broadcasts against a tensor of shape ``shape``."""
        return scale


@dataclass(frozen=True, kw_only=True)
class PerTensor(Grain):
    """One scale for the whole tensor.

    >>> PerTensor().scale_shape((4, 3))
    (1, 1)
    """

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape((1,) * x.dim() + (-1,))

    def scale_shape(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        return (1,) * len(shape)


@dataclass(frozen=True, kw_only=True)
class PerChannel(Grain):
    """One scale for each index along ``axis``.

    >>> PerChannel(axis=1).scale_shape((8, 3, 5, 5))
    (1, 3, 1, 1)
    """

    axis: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.axis, bool) or not isinstance(self.axis, int):
            raise DtypeError(f"{type(self).__name__}.axis={self.axis!r}: must be an integer")

    def _axis(self, dim: int) -> int:
        return check_axis(self.axis, f"{type(self).__name__}.axis", dim)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        axis = self._axis(x.dim())
        flat = x.movedim(axis, 0).reshape(x.shape[axis], x.numel() // max(x.shape[axis], 1))
        return flat.reshape(*self.scale_shape(x.shape), flat.shape[1])

    def scale_shape(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        axis = self._axis(len(shape))
        return tuple(n if i == axis else 1 for i, n in enumerate(shape))


@dataclass(frozen=True, kw_only=True)
class PerRow(PerChannel):
    """One scale for each index along the first axis: a sample of images, a token of sequences.

    >>> PerRow().scale_shape((8, 3))
    (8, 1)
    """

    axis: int = 0

    def __post_init__(self) -> None:
        PerChannel.__post_init__(self)
        if self.axis != 0:
            raise ArgumentError(f"PerRow.axis={self.axis!r}: rows run along axis 0; use PerChannel(axis={self.axis})")


@dataclass(frozen=True, kw_only=True)
class PerBlock(Grain):
    """One scale for each ``size`` consecutive elements of the tensor in row-major order; the last may be shorter.

    >>> PerBlock(size=32).scale_shape((5, 20))
    (4,)
    """

    size: int = 128

    def __post_init__(self) -> None:
        check_integer(self.size, "PerBlock.size", 1)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1)
        missing = -flat.numel() % self.size
        if missing:  # the last element again: it changes neither minimum nor maximum
            flat = torch.cat([flat, flat[-1:].expand(missing)])
        return flat.reshape(-1, self.size)

    def scale_shape(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        return (-(-torch.Size(shape).numel() // self.size),)

    def expand(self, scale: torch.Tensor, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return scale.repeat_interleave(self.size)[:count].reshape(shape)


def as_grain(value: Grain | str) -> Grain:
    """Return a grain from its short name: ``tensor``, ``row``, ``channel``, ``channel:AXIS``, ``block:SIZE``.

    Raises:
        ArgumentError: an unknown name.

    >>> as_grain("channel:0")
    PerChannel(axis=0)
    """
    if isinstance(value, Grain):
        return value
    name, _, argument = str(value).partition(":")
    number = int(argument) if re.fullmatch(r"-?[0-9]+", argument) else None
    if name == "tensor" and not argument:
        return PerTensor()
    if name == "row" and not argument:
        return PerRow()
    if name == "channel" and (number is not None or not argument):
        return PerChannel() if number is None else PerChannel(axis=number)
    if name == "block" and number is not None:
        return PerBlock(size=number)
    raise ArgumentError(f"grain={value!r}: must be 'tensor', 'row', 'channel', 'channel:AXIS' or 'block:SIZE'")
