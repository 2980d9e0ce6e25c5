"""Argument checks with one voice: name the argument, show the value, say what is legal."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from gradbits.core.errors import ArgumentError, DtypeError

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_integer(value: Any, name: str, low: int, high: int | None = None) -> int:
    """Return ``value`` if it is an integer (not a bool) in ``[low, high]``; ``high=None`` means no upper limit."""
    legal = f"an integer from {low} to {high}" if high is not None else f"an integer of at least {low}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise DtypeError(f"{name}={value!r}: must be {legal}")
    if value < low or (high is not None and value > high):
        raise ArgumentError(f"{name}={value!r}: must be {legal}")
    return value


def check_bits(value: Any, name: str = "bits", low: int = 2, high: int = 8) -> int:
    """Return ``value`` if it is a legal number of bits.

    Raises:
        ArgumentError: out of range, or not an integer (``True`` is not a number of bits).

    >>> check_bits(4)
    4
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ArgumentError(f"{name}={value!r}: must be an integer from {low} to {high}")
    return value


def check_instance(value: Any, name: str, *kinds: type | None) -> Any:
    """Return ``value`` if it is of one of ``kinds``; None among them allows None, and only ``bool`` allows a bool.

    >>> check_instance(None, "output", int, None) is None
    True
    """
    real = tuple(k for k in kinds if k is not None)
    fits = isinstance(value, real) and (not isinstance(value, bool) or bool in real)
    if not fits and not (value is None and None in kinds):
        legal = " or ".join("None" if k is None else k.__name__ for k in kinds)
        raise DtypeError(f"{name}={value!r}: must be {legal}")
    return value


def check_choice(value: Any, name: str, choices: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``choices``.

    >>> check_choice("nearest", "rounding", ("nearest", "stochastic"))
    'nearest'
    """
    options = tuple(choices)
    if value not in options:
        raise ArgumentError(f"{name}={value!r}: must be one of {', '.join(map(repr, options))}")
    return str(value)


def check_number(
    value: Any, name: str, low: float, high: float = float("inf"), *, open_low: bool = False, open_high: bool = False
) -> float:
    """Return ``value`` as a float if it is a finite number in the interval; open ends are excluded."""
    left, right = ("(" if open_low else "["), (")" if open_high or high == float("inf") else "]")
    legal = f"a number in {left}{low:g}, {high:g}{right}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DtypeError(f"{name}={value!r}: must be {legal}")
    inside = (low < value if open_low else low <= value) and (value < high if open_high else value <= high)
    if not inside or value in (float("inf"), float("-inf")):  # NaN fails the comparisons
        raise ArgumentError(f"{name}={value!r}: must be {legal}")
    return float(value)


def check_float_tensor(value: Any, name: str) -> torch.Tensor:
    """Return ``value`` if it is a real floating-point tensor.

    Raises:
        DtypeError: not a tensor, or of an integer, bool, complex or quantized dtype.
    """
    if not isinstance(value, torch.Tensor):
        raise DtypeError(f"{name}: must be a floating-point tensor, not {type(value).__name__}")
    if value.dtype not in FLOAT_DTYPES:
        legal = ", ".join(map(str, FLOAT_DTYPES))
        raise DtypeError(f"{name}: dtype {value.dtype} is not supported; use one of {legal}")
    return value


def check_module(value: Any, name: str = "model") -> torch.nn.Module:
    """Return ``value`` if it is a module.

    Raises:
        DtypeError: it is something else.
    """
    if not isinstance(value, torch.nn.Module):
        raise DtypeError(f"{name}: must be a torch.nn.Module, not {type(value).__name__}")
    return value


def check_axis(axis: Any, name: str, dim: int) -> int:
    """Return ``axis`` counted from the front; a negative one counts from the back as in PyTorch.

    >>> check_axis(-1, "axis", 3)
    2
    """
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise DtypeError(f"{name}={axis!r}: must be an integer")
    if not -dim <= axis < dim:
        raise ArgumentError(f"{name}={axis}: a tensor of {dim} dimensions has axes {-dim} to {dim - 1}")
    return axis % dim


def check_output(path: Path | None, name: str) -> Path | None:
    """Return ``path`` if a file can be written there, or None: asked before the work whose result goes there.

    Raises:
        ArgumentError: a folder, or a place below a file or in a folder that may not be written to.

    >>> check_output(None, "json")
    """
    if path is None:
        return None
    if path.is_dir():
        raise ArgumentError(f"{name}={str(path)!r}: is a folder; must be a file")
    folder = next(parent for parent in path.absolute().parents if parent.exists())  # folders below it are made
    if not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise ArgumentError(f"{name}={str(path)!r}: cannot be written; {str(folder)!r} is no folder one may write to")
    return path
