"""What a quantized layer carries besides its float class: what it follows, and what its quantizers remember."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from gradbits.nn.call import Seen
from gradbits.recipes.recipe import Recipe


@dataclass
class Assignment:
    """What a quantized layer follows.

    Args:
        name: the layer's name in its model.
        recipe: which quantizer serves which operand.
        compute: ``"auto"``, ``"integer"`` or ``"simulate"``.
        on_nonfinite: ``"propagate"``, ``"raise"`` or ``"skip"``.
        slots: operand -> name of its state; operands with equal quantizers share one.
        seen: while set, the layer computes so that autograd can differentiate it twice, see
            ``gradbits.nn.twice.twice_differentiable``.
        shapes: of the operands in the layer's last call, and the input's spatial size; None before the first.
        learns: whether its quantizers have parameters of their own.
        number: stands for the layer in the graphs of ``torch.compile``, see ``gradbits.nn.compiled``.
        link: what ties the layer to a graph that quantizes its input and folds its batch norm, or None.
    """

    name: str
    recipe: Recipe
    compute: str
    on_nonfinite: str
    slots: dict[tuple[str, str], str] = field(default_factory=dict)
    seen: Seen | None = None
    shapes: tuple[dict[str, torch.Size], tuple[int, ...]] | None = field(default=None, compare=False)
    link: GraphLink | None = None
    learns: bool = False
    number: int = field(default=0, compare=False)


class GraphLink(Protocol):
    """What a graph around a layer does in the place of its product, see ``gradbits.nn.qat``."""

    def run(
        self, layer: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, size: tuple[int, ...]
    ) -> torch.Tensor:
        """Return the layer's output."""


class QuantizerStates(nn.Module):
    """The quantizer states of one layer, buffers and learned parameters; a float checkpoint without them loads too."""

    def entries(self) -> dict[str, torch.Tensor]:
        """Return every state entry by its full name."""
        return {**dict(self.named_buffers()), **dict(self.named_parameters())}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        own = {f"{prefix}{name}" for name in self.entries()}
        missing: list[str] = args[2]
        before = len(missing)
        super()._load_from_state_dict(state_dict, prefix, *args)
        missing[before:] = [key for key in missing[before:] if key not in own]
