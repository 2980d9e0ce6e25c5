"""The arguments of the native products: what native.h calls ``ProductArgs``, filled from tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from gradbits.kernels.activations import ACTIVATIONS, GELU
from gradbits.kernels.dispatch import Epilogue
from gradbits.kernels.gelu import CURVES
from gradbits.kernels.native.library import Library

TERMS = 6
Triple = ctypes.c_int64 * 3


class Operand(ctypes.Structure):
    """``Operand`` of native.h."""

    _fields_ = [
        ("values", ctypes.c_void_p),
        ("group", ctypes.c_int64),
        ("sample", ctypes.c_int64),
        ("position", ctypes.c_int64),
        ("channel", ctypes.c_int64),
    ]


class EpilogueArgs(ctypes.Structure):
    """``Epilogue`` of native.h."""

    _fields_ = [
        ("scale", Operand),
        ("terms", Operand * TERMS),
        ("count", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("end", ctypes.c_float),
        ("curve", ctypes.POINTER(ctypes.c_float)),
    ]


class ProductArgs(ctypes.Structure):
    """``ProductArgs`` of native.h."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("w", ctypes.c_void_p),
        ("result", ctypes.c_void_p),
        ("groups", ctypes.c_int64),
        ("samples", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("size", Triple),
        ("count", Triple),
        ("taps", Triple),
        ("stride", Triple),
        ("padding", Triple),
        ("dilation", Triple),
        ("x_group", ctypes.c_int64),
        ("x_sample", ctypes.c_int64),
        ("x_channel", ctypes.c_int64),
        ("x_axis", Triple),
        ("w_group", ctypes.c_int64),
        ("w_column", ctypes.c_int64),
        ("w_channel", ctypes.c_int64),
        ("w_tap", Triple),
        ("r_group", ctypes.c_int64),
        ("r_sample", ctypes.c_int64),
        ("r_position", ctypes.c_int64),
        ("r_channel", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("step", Triple),
        ("epilogue", EpilogueArgs),
        ("threads", ctypes.c_int32),
    ]


class FinishArgs(ctypes.Structure):
    """``FinishArgs`` of native.h."""

    _fields_ = [("sums", ctypes.c_void_p), ("product", ProductArgs)]


def triple(values: Sequence[int], fill: int) -> ctypes.Array[ctypes.c_int64]:
    """Return up to three numbers as the last of three, ``fill`` before them."""
    return Triple(*(fill,) * (3 - len(values)), *values)


def plain_args() -> ProductArgs:
    """Return arguments with one group, one tap and one position."""
    one, zero = Triple(1, 1, 1), Triple(0, 0, 0)
    return ProductArgs(groups=1, size=one, count=one, taps=one, stride=one, padding=zero, dilation=one)


def fits(epilogue: Epilogue) -> bool:
    """Return whether the library has room for all terms of an epilogue."""
    return len(epilogue.terms) + (epilogue.bias is not None) <= TERMS


def stored_dtype(epilogue: Epilogue) -> torch.dtype:
    """Return the dtype that the library writes; other ones are cast from it."""
    return torch.bfloat16 if epilogue.dtype == torch.bfloat16 else torch.float32


class Result:
    """The tensor that a product writes, and its epilogue in the terms of native.h.

    Args:
        shape: of the result; axes are (sample, channel, positions...), or (group, ``matrix``, channel).
        epilogue: what follows the sums.
        groups: groups along the axis ``group_axis``.
        group_axis: 0 or 1; ignored for matrices.
        matrix: for a batch of matrices, what their rows are: ``"position"`` or ``"sample"``.
    """

    def __init__(
        self, shape: Sequence[int], epilogue: Epilogue, groups: int = 1, group_axis: int = 1, matrix: str = ""
    ) -> None:
        self.shape, self.matrix, self.group_axis = tuple(shape), matrix, group_axis
        self.per_group = 0 if matrix else self.shape[group_axis] // max(groups, 1)
        self.keep: list[torch.Tensor] = []
        self.epilogue = epilogue

    def fill(self, args: ProductArgs, out: torch.Tensor, lib: Library) -> None:
        """Set the result ``out``, epilogue and threads of ``args``.

        Args:
            args: set here.
            out: a tensor of this shape, in any order of axes; one matrix may lack the axis of its batch.
            lib: the library.
        """
        if out.numel() == 0:
            return
        e = args.epilogue
        own = self._strides((0,) * (len(self.shape) - out.dim()) + out.stride())
        assert own is not None
        args.result = out.data_ptr()
        args.r_group, args.r_sample, args.r_position, args.r_channel = own
        self._set(e.scale, self.epilogue.scale)
        terms = [*self.epilogue.terms, *([] if self.epilogue.bias is None else [self.epilogue.bias])]
        for operand, term in zip(e.terms, terms, strict=False):
            self._set(operand, term)
        e.count, e.dtype = len(terms), 1 if out.dtype == torch.bfloat16 else 0
        if self.epilogue.activation:
            e.activation = ACTIVATIONS.index(self.epilogue.activation)
            if self.epilogue.activation in GELU:
                curve = CURVES[GELU[self.epilogue.activation]][0]
                numbers = (*curve.top, *curve.bottom)
                e.end, e.curve = curve.end, (ctypes.c_float * len(numbers))(*numbers)
        args.threads = lib.threads

    def _set(self, operand: Operand, value: torch.Tensor) -> None:
        if value.dtype != torch.float32:
            value = value.to(torch.float32)
        strides: tuple[int, int, int, int] | None = (0, 0, 0, 0)
        if value.numel() != 1:
            strides = self._strides(self._broadcast(value))
            if strides is None:  # positions that no single stride reaches
                value = value.expand(self.shape).contiguous()
                strides = self._strides(value.stride())
        assert strides is not None
        self.keep.append(value)
        operand.values = value.data_ptr()
        operand.group, operand.sample, operand.position, operand.channel = strides

    def _broadcast(self, value: torch.Tensor) -> tuple[int, ...]:
        """Return the strides of ``value.expand(self.shape)``."""
        strides = [stride if n != 1 else 0 for n, stride in zip(value.shape, value.stride(), strict=True)]
        return (*(0,) * (len(self.shape) - len(strides)), *strides)

    def _strides(self, s: tuple[int, ...]) -> tuple[int, int, int, int] | None:
        """Return the strides along group, sample, position and channel, or None where positions have no one stride.

        Args:
            s: the strides along the axes of the result.
        """
        if self.matrix:
            return (s[0], 0, s[1], s[2]) if self.matrix == "position" else (s[0], s[1], 0, s[2])
        position, reach = 0, 0
        for n, stride in zip(reversed(self.shape[2:]), reversed(s[2:]), strict=True):
            if n == 1:
                continue
            if reach == 0:
                position, reach = stride, n * stride
                if stride == 0:
                    reach = -1
            elif reach == -1 and stride == 0:
                continue
            elif stride == reach:
                reach *= n
            else:
                return None
        return self.per_group * s[self.group_axis], s[0], position, s[1]
