"""The largest magnitude of a tensor, noted on it by who has seen every value, so that nobody need look again."""

from __future__ import annotations

import torch


def note_width(x: torch.Tensor, width: torch.Tensor) -> None:
    """Note that ``width``, one number, is the largest magnitude of ``x``; a change in place makes it void.

    Not for what others may change behind PyTorch's back: parameters (by ``.data``), inputs (by NumPy).
    """
    if x.is_inference():  # whose changes PyTorch does not count
        return
    x.gradbits_width = (x._version, x.data_ptr(), width)  # type: ignore[attr-defined]


def known_width(x: torch.Tensor) -> torch.Tensor | None:
    """Return the largest magnitude of ``x`` where it has been noted, on it or on what it is a reshaped view of.

    >>> x = torch.tensor([1.0, -3.0]); note_width(x, torch.tensor(3.0)); known_width(x).item()
    3.0
    >>> known_width(x.view(2, 1)).item()
    3.0
    >>> known_width(x.mul_(2.0)) is None, known_width(x[:1]) is None
    (True, True)
    """
    if x.is_inference():
        return None
    found = getattr(x, "gradbits_width", None)
    base = x._base
    if found is None and base is not None and base.numel() == x.numel() and base.is_contiguous() and x.is_contiguous():
        found = getattr(base, "gradbits_width", None)  # a reshaped view of all its elements
    if found is None or found[:2] != (x._version, x.data_ptr()):
        return None
    width: torch.Tensor = found[2]
    return width


def alias(x: torch.Tensor) -> torch.Tensor:
    """Return the same values as a tensor of its own, detached, with what has been noted on ``x``.

    >>> x = torch.ones(2); note_width(alias(x), torch.tensor(1.0)); known_width(x) is None
    True
    """
    other, width = x.detach(), known_width(x)
    if width is not None:
        note_width(other, width)
    return other
