"""When modules have to be computed as they are written: hooks, compilers, transforms and tracers look on."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules import module as torch_module

_OWN = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")


def is_watched(module: nn.Module) -> bool:
    """Return whether hooks wait for a module, its own or those of all modules.

    >>> layer = nn.ReLU(); is_watched(layer)
    False
    >>> handle = layer.register_forward_hook(lambda m, args, y: None); is_watched(layer)
    True
    """
    return any(getattr(module, name) for name in _OWN) or any(getattr(torch_module, name) for name in _GLOBAL)


def why_unfused() -> str | None:
    """Return why whatever runs now has to be written in PyTorch's own operations, or None."""
    if torch.compiler.is_compiling():
        return "torch.compile fuses for itself"
    if torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
        return "transforms and tracers know PyTorch's own"
    return None
