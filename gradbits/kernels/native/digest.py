"""A digest of a tensor's memory through the native library."""

from __future__ import annotations

import ctypes

import torch

from gradbits.kernels.native import library
from gradbits.kernels.quantize import memory_order

PIECE = 1 << 18  # bytes that are digested on their own


class DigestArgs(ctypes.Structure):
    """``DigestArgs`` of native.h."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("pieces", ctypes.c_void_p),
        ("digest", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("threads", ctypes.c_int32),
    ]


def digest(x: torch.Tensor) -> torch.Tensor:
    """Return the int64 digest of the bytes of ``x`` as ``gradbits.kernels.coding.digest`` does."""
    if memory_order(x) is None:
        x = x.contiguous()
    lib, count = library.loaded(), x.numel() * x.element_size()
    room = torch.empty(-(-count // PIECE) + 1, dtype=torch.int64)
    start = room.data_ptr()
    lib.call("gradbits_digest", DigestArgs(x.data_ptr(), start + 8, start, count, lib.threads))
    return room[0]
