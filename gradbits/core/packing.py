"""Packed codes: 4-bit codes two to a byte, 2-bit codes four to a byte; symbols of 1 to 8 bits without gaps."""

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


def symbol_bytes(bits: int, count: int) -> int:
    """Return the bytes that ``count`` symbols of exactly ``bits`` bits take.

    >>> symbol_bytes(3, 8), symbol_bytes(3, 9)
    (3, 4)
    """
    return (count * bits + 7) // 8


def pack_symbols(symbols: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack symbols without gaps: symbol i takes bits i*b to (i+1)*b - 1 of the stream, the lowest bits of a byte first.

    Args:
        symbols: flat uint8 tensor, values below 2^b.
        bits: b, bits of one symbol, 1 to 8.

    Raises:
        DtypeError: ``symbols`` is not uint8.

    >>> pack_symbols(torch.tensor([1, 2, 3], dtype=torch.uint8), 3).tolist()
    [209, 0]
    """
    if symbols.dtype != torch.uint8:
        raise DtypeError(f"symbols: dtype {symbols.dtype} is not supported; must be torch.uint8")
    check_integer(bits, "bits", 1, 8)
    flat = symbols.reshape(-1)
    if bits == 8:
        return flat.clone()
    count = flat.numel()
    groups = torch.nn.functional.pad(flat, (0, -count % 8)).view(-1, 8)
    if bits in (1, 2, 4):
        lanes = groups.view(-1, 8 // bits)
        packed = lanes[:, 0].clone()
        for lane in range(1, 8 // bits):
            packed |= lanes[:, lane] << (lane * bits)
        return packed[: symbol_bytes(bits, count)]
    words = torch.zeros(groups.shape[0], dtype=torch.int64, device=flat.device)  # eight symbols make b bytes
    for lane in range(8):
        words |= groups[:, lane].to(torch.int64) << (lane * bits)
    return words.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1)[: symbol_bytes(bits, count)]


def unpack_symbols(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the first ``count`` symbols of ``packed`` as a flat uint8 tensor.

    Raises:
        DtypeError: ``packed`` is not uint8.
        ArgumentError: ``packed`` is too short for ``count`` symbols.

    >>> unpack_symbols(torch.tensor([209, 0], dtype=torch.uint8), 3, 3).tolist()
    [1, 2, 3]
    """
    if packed.dtype != torch.uint8:
        raise DtypeError(f"packed: dtype {packed.dtype} is not supported; must be torch.uint8")
    check_integer(bits, "bits", 1, 8)
    check_integer(count, "count", 0)
    size = symbol_bytes(bits, count)
    if packed.numel() < size:
        raise ArgumentError(f"packed: {packed.numel()} bytes hold fewer than {count} symbols of {bits} bits")
    flat = packed.reshape(-1)[:size]
    if bits == 8:
        return flat.clone()
    mask = (1 << bits) - 1
    if bits in (1, 2, 4):
        lanes = [(flat >> (lane * bits)) & mask for lane in range(8 // bits)]
        return torch.stack(lanes, dim=1).reshape(-1)[:count]
    groups = torch.nn.functional.pad(flat, (0, -size % bits)).view(-1, bits)
    words = torch.nn.functional.pad(groups, (0, 8 - bits)).view(-1).view(torch.int64)
    symbols = torch.empty(words.numel(), 8, dtype=torch.uint8, device=packed.device)
    for lane in range(8):
        symbols[:, lane] = (words >> (lane * bits)) & mask
    return symbols.view(-1)[:count]
