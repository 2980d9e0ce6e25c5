"""Sums of the columns of a matrix through the native library."""

from __future__ import annotations

import ctypes

import torch

from gradbits.kernels.columns import ROWS
from gradbits.kernels.native import library
from gradbits.kernels.native.quantize import DTYPES


class ColumnSumsArgs(ctypes.Structure):
    """``ColumnSumsArgs`` of native.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "room", "widest")),
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        *((name, ctypes.c_int32) for name in ("dtype", "threads")),
    ]


def column_sums(rows: torch.Tensor, widest: torch.Tensor | None = None) -> torch.Tensor:
    """Return the sums of the columns as ``gradbits.kernels.columns.column_sums`` does, in one pass with ``widest``."""
    lib, (count, columns) = library.loaded(), rows.shape
    rows = (rows if rows.dtype in DTYPES else rows.float()).contiguous()
    widest = torch.empty(()) if widest is None else widest
    if rows.numel() == 0:
        widest.zero_()
        return torch.zeros(columns)
    room = torch.empty(-(-count // ROWS), columns)
    args = ColumnSumsArgs(
        rows.data_ptr(), room.data_ptr(), widest.data_ptr(), count, columns, DTYPES[rows.dtype], lib.threads
    )
    lib.call("gradbits_column_sums", args)
    return room[0].clone() if len(room) > 1 else room[0]
