"""Small operations on values and codes with torch: ranges, packing; the reference for faster backends."""

from __future__ import annotations

import torch

from gradbits.core.packing import pack_codes, unpack_codes
from gradbits.kernels.dispatch import Kernel, Request
from gradbits.kernels.quantize import memory_order


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


def digest(x: torch.Tensor) -> torch.Tensor:
    """Return an int64 number that tells the bytes of ``x``, in memory order, from others: a check, not a proof.

    Every 2^18 bytes are 128 polynomials of 32-bit words, so one changed word always changes the result.

    >>> x = torch.arange(6.0); before = digest(x).item(); x.data[2] = 7.0; before == digest(x).item()
    False
    """
    order = memory_order(x)
    data = (x if order is None else x.permute(order)).contiguous().reshape(-1).view(torch.uint8)
    value = torch.tensor(data.numel(), dtype=torch.int64, device=x.device)
    for piece in data.split(1 << 18):
        words = torch.nn.functional.pad(piece, (0, -piece.numel() % 512)).view(torch.int32).long() & 0xFFFFFFFF
        powers = [1]
        for _ in range(words.numel() // 128 - 1):
            powers.append(powers[-1] * 0x9E3779B1 & 0xFFFFFFFF)
        factors = torch.tensor(powers[::-1], dtype=torch.int64, device=x.device)
        lanes = (words.view(-1, 128) * factors[:, None]).sum(0) & 0xFFFFFFFF  # int64 wraps: the low 32 bits are right
        sums = torch.zeros_like(value)
        for lane in lanes:
            sums = sums * _signed(0x9E3779B97F4A7C15) + lane
        value = value * _signed(0xD1342543DE82EF95) + sums
    return value


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def kernels() -> tuple[Kernel, ...]:
    """Return the kernels of this backend."""

    def always(request: Request) -> str | None:
        return None

    return tuple(Kernel(f.__name__, "torch", f, always) for f in (min_max, pack, unpack, sum_codes, digest))
