"""A ReLU behind a quantized layer, computed by the layer's kernel where nothing needs what was before it."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from gradbits.nn.watched import is_watched

# the layer whose call is under way, and what follows it; of this thread, so that others may call the layer meanwhile
_UNDER_WAY: ContextVar[tuple[nn.Module, str] | None] = ContextVar("gradbits_activation", default=None)


def run_activated(layer: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """Return ``relu(layer(x))`` computed by the layer's kernel, or None where it is to be computed as written.

    That is for a layer which is not quantized, where a gradient will be wanted, which needs the sign of what was
    before, and where a hook waits for it.
    """
    assignment: Any = getattr(layer, "assignment", None)
    if assignment is None or assignment.link is not None or assignment.seen is not None or is_watched(layer):
        return None
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in layer.parameters())):
        return None
    token = _UNDER_WAY.set((layer, "relu"))
    try:
        y: torch.Tensor = layer(x)
    finally:
        _UNDER_WAY.reset(token)
    return y


def activation_of(layer: object) -> str:
    """Return the activation that the call of ``layer`` which is under way is to apply, or an empty name."""
    wanted = _UNDER_WAY.get()
    return wanted[1] if wanted is not None and wanted[0] is layer else ""
