"""A ReLU behind a quantized layer, computed by the layer's kernel where nothing needs what was before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

_NOTE = "gradbits_activated"


class FollowingReLU(nn.ReLU):
    """A ReLU that the layer before it may have computed already.

    >>> FollowingReLU()(torch.tensor([-1.0, 2.0])).tolist()
    [0.0, 2.0]
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the positive part of ``input``: itself, where the layer before left nothing else."""
        return input if vars(input).pop(_NOTE, False) else super().forward(input)


def activation_now(layer: Any, *operands: torch.Tensor | None) -> str:
    """Return the activation that a layer's kernel is to apply in this call.

    None where a gradient will be wanted, which needs the sign of what was before, or where a hook waits for it. Once
    too often would do no harm: a ReLU of a ReLU is the same.

    Args:
        layer: a quantized layer.
        operands: of its call.
    """
    name: str = layer.assignment.activation
    if not name or torch.compiler.is_compiling():
        return ""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands):
        return ""
    waits = layer._forward_hooks or torch_module._global_forward_hooks
    return "" if waits or layer.assignment.link is not None or layer.assignment.seen is not None else name


def note_activated(y: torch.Tensor) -> torch.Tensor:
    """Note on the result of a layer that its activation was applied."""
    vars(y)[_NOTE] = True
    return y


def follow_(layer: nn.Module, activation: nn.Module) -> bool:
    """Let ``layer`` compute the ``activation`` behind it; return whether it can."""
    assignment = getattr(layer, "assignment", None)
    if assignment is None or type(activation) not in (nn.ReLU, FollowingReLU):
        return False
    assignment.activation = "relu"
    activation.__class__ = FollowingReLU
    return True
