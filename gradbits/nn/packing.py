"""``pack_activations`` for every forward pass of a model, without a context around it."""

from __future__ import annotations

from typing import Any

from torch import nn

from gradbits.nn.activations import pack_activations


class Packing:
    """Hooks that open ``pack_activations`` before a model's forward pass and close it afterwards, errors included.

    Args:
        bits: see ``pack_activations``.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.open: list[pack_activations] = []  # several where forward passes are nested

    def begin(self, module: nn.Module, args: Any) -> None:
        """Start packing."""
        self.open.append(pack_activations(bits=self.bits))
        self.open[-1].__enter__()

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Stop packing."""
        if self.open:  # empty where opening it was what failed
            self.open.pop().__exit__(None, None, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Packing:
        return Packing(self.bits)

    def __reduce__(self) -> tuple[Any, ...]:
        return Packing, (self.bits,)


def set_packing(model: nn.Module, bits: int | None) -> None:
    """Make every forward pass of ``model`` keep its activations in ``bits``; None ends it.

    Args:
        model: changed in place.
        bits: 2 to 8, or None.
    """
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Packing)]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)
    if bits is not None:
        packing = Packing(pack_activations(bits=bits).bits)
        model.register_forward_pre_hook(packing.begin, prepend=True)
        model.register_forward_hook(packing.end, always_call=True)


def packing_of(model: nn.Module) -> int | None:
    """Return the bits that ``set_packing`` was given, or None."""
    owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    return next((owner.bits for owner in owners if isinstance(owner, Packing)), None)
