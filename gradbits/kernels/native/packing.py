"""Packed codes through the native library; same arguments and bytes as ``gradbits.core.packing``."""

from __future__ import annotations

import ctypes

import torch

from gradbits.core.packing import pack_codes, packed_width, unpack_codes
from gradbits.kernels.native import library


class PackArgs(ctypes.Structure):
    """``PackArgs`` of native.h."""

    _fields_ = [
        ("from_", ctypes.c_void_p),
        ("to", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("width", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return int8 ``codes`` packed as ``pack_codes`` does."""
    width = packed_width(bits)
    if width == 8 or codes.dtype != torch.int8:
        return pack_codes(codes, bits)
    flat, lib = codes.reshape(-1).contiguous(), library.loaded()
    packed = torch.empty((flat.numel() * width + 7) // 8, dtype=torch.uint8)
    lib.call("gradbits_pack", PackArgs(flat.data_ptr(), packed.data_ptr(), flat.numel(), width, lib.threads))
    return packed


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return ``count`` codes as ``unpack_codes`` does."""
    width = packed_width(bits)
    if width == 8 or packed.numel() * (8 // width) < count:
        return unpack_codes(packed, bits, count)
    packed, lib = packed.contiguous(), library.loaded()
    codes = torch.empty(count, dtype=torch.int8)
    lib.call("gradbits_unpack", PackArgs(packed.data_ptr(), codes.data_ptr(), count, width, lib.threads))
    return codes
