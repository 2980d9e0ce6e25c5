"""Batch norm with the shortcut and the ReLU behind it through the native library, in few passes over memory."""

from __future__ import annotations

import ctypes

import torch

from gradbits.kernels.native import library

LEAST_LANES = 64  # fewer channels are repeated until a row is that long
TASK_ROWS = 256  # rows that are summed in float32 before float64 takes over


class NormArgs(ctypes.Structure):
    """``NormArgs`` of native.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "other", "g", "y", "rest", "mask", "weight", "bias")),
        *((name, ctypes.c_void_p) for name in ("mean", "inverse", "var", "totals", "widest", "room")),
        *((name, ctypes.c_int64) for name in ("total", "channels", "lanes", "size")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("of_batch", "dtype", "backward", "threads")),
    ]


def why_not(x: torch.Tensor) -> str | None:
    """Return why ``x`` cannot be normalized here, or None."""
    if x.dim() < 2 or x.numel() == 0 or not x.movedim(1, -1).is_contiguous():
        return "channels are not last in memory"
    return library.why_not_floats(x)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    other: torch.Tensor | None,
    statistics: torch.Tensor,
    eps: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ``relu((x - mean) * inverse * weight + bias + other)``, where it is positive, and its largest value.

    Args:
        x: [N, C, *] with channels last in memory.
        weight, bias: float32 [C], or None.
        other: like ``x``, or None.
        statistics: float32 [3, C]: mean, inverse of the deviation, variance.
        eps: added to the variance of the batch, whose statistics are written; None takes those that are given.
    """
    args, room = _args(x, weight, statistics)
    widest = torch.empty(())
    y, mask = torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
    totals = torch.empty(2, x.shape[1], dtype=torch.float64)
    args.bias, args.other, args.totals = _pointer(bias), _pointer(other), totals.data_ptr()
    args.mask, args.y, args.eps, args.of_batch = mask.data_ptr(), y.data_ptr(), eps or 0.0, eps is not None
    args.widest = widest.data_ptr()
    library.loaded().call("gradbits_norm", args)
    del room
    return y, mask, widest


def backward(
    g: torch.Tensor,
    x: torch.Tensor,
    mask: torch.Tensor,
    weight: torch.Tensor | None,
    statistics: torch.Tensor,
    of_batch: bool,
    other: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Return the gradients of ``x``, of the shortcut if ``other``, of bias and weight as float32 [2, C]; the largest
    magnitude of the first.

    Args:
        g, x, mask: [N, C, *] with channels last in memory.
        weight: float32 [C], or None.
        statistics: float32 [3, C] of ``forward``.
        of_batch: whether they depend on ``x``.
        other: whether there was a shortcut.
    """
    args, room = _args(x, weight, statistics)
    widest = torch.empty(())
    y, rest = torch.empty_like(x), torch.empty_like(x) if other else None
    totals = torch.empty(2, x.shape[1], dtype=torch.float64)
    args.g, args.mask, args.y, args.rest = g.data_ptr(), mask.data_ptr(), y.data_ptr(), _pointer(rest)
    args.totals, args.of_batch, args.backward = totals.data_ptr(), of_batch, 1
    args.widest = widest.data_ptr()
    library.loaded().call("gradbits_norm", args)
    del room
    return y, rest, totals.float(), widest


def _args(x: torch.Tensor, weight: torch.Tensor | None, statistics: torch.Tensor) -> tuple[NormArgs, torch.Tensor]:
    """Return what every call needs, and the room that it works in."""
    channels, total = x.shape[1], x.numel()
    lanes = max(1, LEAST_LANES // channels) * channels
    tasks = -(-total // (lanes * TASK_ROWS))
    room = torch.empty(lanes * (4 + 2 * tasks))
    mean = statistics.data_ptr()
    args = NormArgs(x=x.data_ptr(), weight=_pointer(weight), room=room.data_ptr(), total=total)
    args.mean, args.inverse, args.var = mean, mean + 4 * channels, mean + 8 * channels
    args.channels, args.lanes, args.size = channels, lanes, TASK_ROWS
    args.dtype, args.threads = int(x.dtype == torch.bfloat16), library.loaded().threads
    return args, room


def _pointer(value: torch.Tensor | None) -> int | None:
    return None if value is None else value.data_ptr()
