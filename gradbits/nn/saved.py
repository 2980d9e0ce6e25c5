"""What a quantized layer keeps for its backward pass: tensors go to autograd, their meaning stays on the context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch

from gradbits.core.spec import Spec


@dataclass(frozen=True)
class Handle:
    """A frozen dataclass without its tensors, and where those are."""

    blank: Any
    held: dict[str, Any]


@dataclass(frozen=True)
class Kept:
    """What a quantized layer says of the int8 codes that it saves, to whoever stores saved tensors.

    Args:
        again: computes the same codes again, or None where the operand is not there any more.
        signs_of: returns the operand if a code has the sign of its value or is 0, else None.
    """

    again: Callable[[], torch.Tensor] | None = None
    signs_of: Callable[[], torch.Tensor | None] = lambda: None


def keep_as(tensor: torch.Tensor, kept: Kept) -> None:
    """Say of a tensor how it may be kept."""
    tensor.gradbits_kept = kept  # type: ignore[attr-defined]


def kept_as(tensor: torch.Tensor) -> Kept | None:
    """Return what was said of a tensor, or None."""
    return getattr(tensor, "gradbits_kept", None)


class Saver:
    """Takes values apart into what ``save_for_backward`` stores and handles that find it again.

    >>> saver = Saver()
    >>> handle = saver.add(torch.ones(2))
    >>> Saver.get(tuple(saver.tensors), handle).tolist()
    [1.0, 1.0]
    """

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []

    def add(self, value: Any) -> Any:
        """Store the tensors of a tensor, a QTensor, or None; return how to find them again."""
        if value is None or isinstance(value, torch.Tensor):
            return self._put(value)
        held = {name: self.add(part) for name, part in vars(value).items() if _has_tensors(part)}
        return Handle(_with(value, dict.fromkeys(held)), held)

    def _put(self, tensor: torch.Tensor | None) -> int | None:
        if tensor is None:
            return None
        for index, known in enumerate(self.tensors):
            if known is tensor:
                return index
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    @staticmethod
    def get(saved: tuple[torch.Tensor, ...], handle: Any) -> Any:
        """Return the value that ``add`` described by ``handle``."""
        if isinstance(handle, Handle):
            return _with(handle.blank, {name: Saver.get(saved, h) for name, h in handle.held.items()})
        return None if handle is None else saved[handle]


def _with(value: Any, parts: dict[str, Any]) -> Any:
    """Return a copy of a dataclass with other parts; ``dataclasses.replace`` takes ten times as long."""
    copy = object.__new__(type(value))
    vars(copy).update(vars(value), **parts)
    return copy


def _has_tensors(value: Any) -> bool:
    if value is None or isinstance(value, (int, tuple, torch.dtype, Spec, type)):
        return False
    return isinstance(value, torch.Tensor) or is_dataclass(value)
