"""Sums of codes along one axis through the native library."""

from __future__ import annotations

import ctypes

import torch

from gradbits.kernels.native import library
from gradbits.kernels.quantize import memory_order


class SumsArgs(ctypes.Structure):
    """``SumsArgs`` of native.h."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("outer", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("threads", ctypes.c_int32),
    ]


def sum_codes(codes: torch.Tensor, axis: int) -> torch.Tensor:
    """Return the int32 sums of ``codes`` as ``gradbits.kernels.coding.sum_codes`` does."""
    lib, order = library.loaded(), memory_order(codes)
    if order is None:
        codes, order = codes.contiguous(), tuple(range(codes.dim()))
    sizes, place = [codes.shape[i] for i in order], order.index(axis)
    shape = [*sizes[:place], 1, *sizes[place + 1 :]]
    sums = torch.empty(shape, dtype=torch.int32)
    if sums.numel():
        outer, inner = torch.Size(sizes[:place]).numel(), torch.Size(sizes[place + 1 :]).numel()
        lib.call(
            "gradbits_sums",
            SumsArgs(codes.data_ptr(), sums.data_ptr(), outer, sizes[place], inner, lib.threads),
        )
    return sums.permute(sorted(range(codes.dim()), key=order.__getitem__))
