"""Packed codes: 4-bit codes two to a byte, 2-bit codes four to a byte."""

from __future__ import annotations

import torch

from gradbits.core.checks import check_integer
from gradbits.core.errors import ArgumentError, DtypeError


def packed_width(bits: int) -> int:
    """Return the bits that one packed code of ``bits`` bits takes: 2, 4 or 8.

    >>> [packed_width(b) for b in (2, 3, 4, 5, 8)]
    [2, 4, 4, 8, 8]
    """
    check_integer(bits, "bits", 1, 8)
    return 2 if bits <= 2 else 4 if bits <= 4 else 8


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack signed codes into bytes, the element of lower index in the lower bits, the last byte filled with zeros.

    Args:
        codes: int8 tensor of any shape with values in [-2^(w-1), 2^(w-1) - 1], w = ``packed_width(bits)``.
        bits: bits of one code, 2 to 8.

    Raises:
        DtypeError: ``codes`` is not int8.

    >>> pack_codes(torch.tensor([1, -1, 7], dtype=torch.int8), 4).tolist()
    [241, 7]
    """
    if codes.dtype != torch.int8:
        raise DtypeError(f"codes: dtype {codes.dtype} is not supported; must be torch.int8")
    width = packed_width(bits)
    flat = codes.reshape(-1).view(torch.uint8)
    if width == 8:
        return flat.clone()
    per_byte = 8 // width
    missing = -flat.numel() % per_byte
    if missing:
        flat = torch.cat([flat, flat.new_zeros(missing)])
    lanes = (flat & ((1 << width) - 1)).view(-1, per_byte)
    packed = lanes[:, 0].clone()
    for lane in range(1, per_byte):
        packed |= lanes[:, lane] << (lane * width)
    return packed


def unpack_codes(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the first ``count`` signed codes of ``packed`` as a flat int8 tensor.

    Raises:
        DtypeError: ``packed`` is not uint8.
        ArgumentError: ``packed`` is too short for ``count`` codes.

    >>> unpack_codes(pack_codes(torch.tensor([1, -2, 0], dtype=torch.int8), 2), 2, 3).tolist()
    [1, -2, 0]
    """
    if packed.dtype != torch.uint8:
        raise DtypeError(f"packed: dtype {packed.dtype} is not supported; must be torch.uint8")
    width = packed_width(bits)
    per_byte = 8 // width
    check_integer(count, "count", 0)
    if packed.numel() * per_byte < count:
        raise ArgumentError(f"packed: {packed.numel()} bytes hold {packed.numel() * per_byte} codes, not {count}")
    if width == 8:
        return packed[:count].view(torch.int8).clone()
    # shifting left, then arithmetically right, extends the sign
    signed = packed.view(torch.int8)
    lanes = [(signed << (8 - width * (lane + 1))) >> (8 - width) for lane in range(per_byte)]
    return torch.stack(lanes, dim=1).reshape(-1)[:count]
