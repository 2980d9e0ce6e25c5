"""The numbers of integer operations that are no tensors, kept in their state all the same."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from gradbits.core.errors import ArgumentError
from gradbits.kernels.fixed_point import ROUNDINGS


class Numbered(nn.Module):
    """An operation whose zero points, limits and factors travel with its tensors: a state without them would be wrong.

    They are one float64 tensor in ``state_dict``, which holds every integer up to 2^53.
    """

    numbers: ClassVar[tuple[str, ...]] = ()

    def get_extra_state(self) -> torch.Tensor:
        """Return the numbers as one tensor."""
        return torch.tensor([n for name in self.numbers for n in _flat(getattr(self, name))], dtype=torch.float64)

    def set_extra_state(self, state: Any) -> None:
        """Take over the numbers.

        Raises:
            ArgumentError: they are those of another operation.
        """
        own = self.get_extra_state()
        if not isinstance(state, torch.Tensor) or state.shape != own.shape:
            shape = tuple(state.shape) if isinstance(state, torch.Tensor) else type(state).__name__
            raise ArgumentError(
                f"state_dict: {type(self).__name__} has numbers {shape}; must be {tuple(own.shape)}, of a model that "
                "was converted in the same way"
            )
        left = [float(n) for n in state.tolist()]
        for name in self.numbers:
            setattr(self, name, _filled(getattr(self, name), left))


def _flat(value: Any) -> list[float]:
    if value is None:
        return []
    if isinstance(value, str):
        return [float(ROUNDINGS.index(value))]
    if is_dataclass(value):
        return [n for field in fields(value) for n in _flat(getattr(value, field.name))]
    if isinstance(value, tuple):
        return [n for item in value for n in _flat(item)]
    return [float(value)]


def _filled(like: Any, left: list[float]) -> Any:
    """Return a value of the form of ``like`` with the first of the numbers ``left``, which are taken away."""
    if like is None:
        return None
    if isinstance(like, str):
        return ROUNDINGS[int(left.pop(0))]
    if is_dataclass(like) and not isinstance(like, type):
        return replace(like, **{f.name: _filled(getattr(like, f.name), left) for f in fields(like)})
    if isinstance(like, tuple):
        return tuple(_filled(item, left) for item in like)
    return type(like)(left.pop(0))
