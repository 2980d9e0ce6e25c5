"""Batch norm with the shortcut and the ReLU behind it through the native library, in one pass over memory."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import torch

from gradbits.kernels.native import library

SUMS, FORWARD, BACKWARD = range(3)
LEAST_LANES = 64  # fewer channels are repeated until a row is that long
TASK_ROWS = 256  # rows that are summed in float32 before float64 takes over


class NormArgs(ctypes.Structure):
    """``NormArgs`` of native.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "other", "g", "y", "rest", "mask")),
        *((name, ctypes.c_void_p) for name in ("scale", "shift", "offset", "slope", "sums")),
        *((name, ctypes.c_int64) for name in ("total", "lanes", "size")),
        *((name, ctypes.c_int32) for name in ("dtype", "kind", "threads")),
    ]


def why_not(x: torch.Tensor) -> str | None:
    """Return why ``x`` cannot be normalized here, or None."""
    if x.device.type != "cpu":
        return "runs on the processor"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"dtype {x.dtype} is neither float32 nor bfloat16"
    if x.dim() < 2 or x.numel() == 0 or not x.movedim(1, -1).is_contiguous():
        return "channels are not last in memory"
    return library.why_not()


def sums(
    x: torch.Tensor, shift: torch.Tensor, g: torch.Tensor | None = None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return, in float64 [2, C], the sums over all but the channels of v = x - shift and of v^2, or of g and of g v.

    Args:
        x: [N, C, *] with channels last in memory.
        shift: [C].
        g: like ``x``.
        mask: bool, like ``x``: where ``g`` counts.
    """
    args, repeated, lanes = _args(x, SUMS)
    kept = [repeated(shift)]
    args.shift = kept[0].data_ptr()
    args.g, args.mask = _pointer(g), _pointer(mask)
    tasks = math.ceil(math.ceil(x.numel() / lanes) / TASK_ROWS)
    parts = torch.empty(tasks, 2, lanes // x.shape[1], x.shape[1])
    args.sums = parts.data_ptr()
    library.loaded().call("gradbits_norm", args)
    return parts.double().sum((0, 2))


def forward(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, other: torch.Tensor | None, relu: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return ``x * scale + shift (+ other)``, behind a ReLU if wanted, and where it is positive.

    Args:
        x: [N, C, *] with channels last in memory.
        scale, shift: [C].
        other: like ``x``, or None.
        relu: whether a ReLU follows.
    """
    args, repeated, _ = _args(x, FORWARD)
    kept = [repeated(scale), repeated(shift)]
    y = torch.empty_like(x)
    mask = torch.empty_like(x, dtype=torch.bool) if relu else None
    args.scale, args.shift = (t.data_ptr() for t in kept)
    args.other, args.mask, args.y = _pointer(other), _pointer(mask), y.data_ptr()
    library.loaded().call("gradbits_norm", args)
    return y, mask


def backward(
    g: torch.Tensor,
    x: torch.Tensor,
    mask: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    offset: torch.Tensor,
    slope: torch.Tensor,
    other: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return ``(g - offset - (x - shift) slope) scale`` and, if ``other``, g itself; g is 0 where ``mask`` is False.

    Args:
        g, x, mask: [N, C, *] with channels last in memory.
        scale, shift, offset, slope: [C].
        other: whether g is wanted.
    """
    args, repeated, _ = _args(x, BACKWARD)
    kept = [repeated(t) for t in (scale, shift, offset, slope)]
    y, rest = torch.empty_like(x), torch.empty_like(x) if other else None
    args.scale, args.shift, args.offset, args.slope = (t.data_ptr() for t in kept)
    args.g, args.mask, args.y, args.rest = g.data_ptr(), _pointer(mask), y.data_ptr(), _pointer(rest)
    library.loaded().call("gradbits_norm", args)
    return y, rest


def _args(x: torch.Tensor, kind: int) -> tuple[NormArgs, Callable[[torch.Tensor], torch.Tensor], int]:
    """Return what every call needs, what repeats a parameter over the lanes, and their number."""
    channels = x.shape[1]
    times = max(1, LEAST_LANES // channels) if channels < LEAST_LANES else 1
    lanes = times * channels

    def repeated(value: torch.Tensor) -> torch.Tensor:
        return value.float().repeat(times) if times > 1 else value.float().contiguous()

    args = NormArgs(x=x.data_ptr(), total=x.numel(), lanes=lanes, size=TASK_ROWS, kind=kind)
    args.dtype, args.threads = int(x.dtype == torch.bfloat16), library.loaded().threads
    return args, repeated, lanes


def _pointer(value: torch.Tensor | None) -> int | None:
    return None if value is None else value.data_ptr()
