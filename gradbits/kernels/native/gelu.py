"""GELU and its gradient through the native library, in one pass that finds the largest magnitude too."""

from __future__ import annotations

import ctypes

import torch

from gradbits.kernels.gelu import CURVES
from gradbits.kernels.native import library
from gradbits.kernels.quantize import memory_order

COEFFICIENTS = 13  # of a curve, as native.h has it


class GeluArgs(ctypes.Structure):
    """``GeluArgs`` of native.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "g", "y", "widest")),
        ("total", ctypes.c_int64),
        ("curve", ctypes.c_float * COEFFICIENTS),
        ("end", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("dtype", "threads")),
    ]


def why_not(x: torch.Tensor) -> str | None:
    """Return why GELU of ``x`` cannot be computed here, or None."""
    if x.numel() == 0 or memory_order(x) is None:
        return "the input is empty, or has gaps in memory"
    return library.why_not_floats(x)


def gelu(x: torch.Tensor, approximate: str, g: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return GELU of ``x``, or with ``g`` the gradient of ``x``; and the largest magnitude of what is returned.

    Args:
        x: float32 or bfloat16 without gaps in memory.
        approximate: ``"none"`` or ``"tanh"``, as in ``torch.nn.GELU``.
        g: gradient of the output, like ``x`` and in the same memory order, or None.
    """
    lib, curve = library.loaded(), CURVES[approximate][g is not None]
    y, widest = torch.empty_like(x), torch.empty(())
    args = GeluArgs(
        x.data_ptr(), None if g is None else g.data_ptr(), y.data_ptr(), widest.data_ptr(), x.numel(),
        (ctypes.c_float * COEFFICIENTS)(*curve.top, *curve.bottom), curve.end,
        int(x.dtype == torch.bfloat16), lib.threads,
    )  # fmt: skip
    lib.call("gradbits_gelu", args)
    return y, widest
