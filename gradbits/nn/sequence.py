"""A Sequential that computes a ReLU together with what is before it, where nobody can see the difference."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gradbits.nn.activated import run_activated
from gradbits.nn.norm import run_fused
from gradbits.nn.watched import is_watched, why_unfused


class FusedSequential(nn.Sequential):
    """A ``torch.nn.Sequential`` as ``fuse_`` makes it.

    Batch norms and quantized layers that a ``ReLU`` follows are computed together with it. The modules themselves
    are what they were: one that is called alone, in a slice or in another place gives what it always gave.

    >>> FusedSequential(nn.Identity(), nn.ReLU())(torch.tensor([-1.0, 2.0])).tolist()
    [0.0, 2.0]
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return what the modules give one after the other."""
        if not isinstance(input, torch.Tensor) or why_unfused() is not None:
            y: torch.Tensor = super().forward(input)
            return y
        modules = list(self)
        value: Any = input
        while modules:
            first = modules.pop(0)
            together = _together(first, modules[0], value) if modules and isinstance(value, torch.Tensor) else None
            if together is not None:
                modules.pop(0)
            value = first(value) if together is None else together
        found: torch.Tensor = value
        return found


def _together(first: nn.Module, relu: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """Return ``relu(first(x))`` computed at once, or None where it is to be computed one by one."""
    if not can_join(first, relu) or is_watched(relu):
        return None
    return run_fused(first, x) if type(first) is nn.BatchNorm2d else run_activated(first, x)


def can_join(first: nn.Module, relu: nn.Module) -> bool:
    """Return whether ``relu`` is a ReLU that can be computed with a batch norm or quantized layer before it."""
    return type(relu) is nn.ReLU and (type(first) is nn.BatchNorm2d or hasattr(first, "assignment"))
