"""Small operations on values and codes with torch: ranges, packing; the reference for faster backends."""

from __future__ import annotations

import torch

from gradbits.core.packing import pack_codes, unpack_codes
from gradbits.kernels.dispatch import Kernel, Request


def min_max(x: torch.Tensor, axis: int | None = None) -> torch.Tensor:
    """Return minimum and maximum, in float32, of all of ``x`` or of each index along ``axis``; NaN spreads.

    Args:
        x: floating-point values, not empty.
        axis: None gives shape [2], an axis of size n gives shape [2, n].

    >>> min_max(torch.tensor([[1.0, -2.0], [3.0, 4.0]]), 0).tolist()
    [[-2.0, 3.0], [1.0, 4.0]]
    """
    if axis is None:
        return torch.stack(torch.aminmax(x)).float()
    return torch.stack(torch.aminmax(x.movedim(axis, 0).reshape(x.shape[axis], -1), dim=1)).float()


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return ``codes`` packed as ``gradbits.core.packing.pack_codes`` does."""
    return pack_codes(codes, bits)


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return ``count`` codes as ``gradbits.core.packing.unpack_codes`` does."""
    return unpack_codes(packed, bits, count)


def sum_codes(codes: torch.Tensor, axis: int) -> torch.Tensor:
    """Return the int32 sums of int8 ``codes`` along ``axis``, which keeps one entry; at most 2^24 codes in a sum.

    >>> sum_codes(torch.tensor([[1, 2], [3, 4]], dtype=torch.int8), 0).tolist()
    [[4, 6]]
    """
    return codes.sum(axis, keepdim=True, dtype=torch.int32)


def kernels() -> tuple[Kernel, ...]:
    """Return the kernels of this backend."""

    def always(request: Request) -> str | None:
        return None

    return tuple(Kernel(f.__name__, "torch", f, always) for f in (min_max, pack, unpack, sum_codes))
