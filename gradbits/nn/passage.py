"""How a gradient passes back through the quantizer of a forward operand: masks, learned steps, rotations."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradbits.core.qtensor import QTensor, Rotation
from gradbits.nn.call import Call


@dataclass(frozen=True)
class Passage:
    """What one operand's quantizer keeps for its gradient; None in place of a passage lets it through unchanged.

    Args:
        rotation: what the operand went through before the grid.
        mask: where the gradient passes, after the rotation.
        value: the operand itself, where its quantizer learns.
    """

    rotation: Rotation | None
    mask: torch.Tensor | None
    value: torch.Tensor | None

    def shares_rotation(self, other: QTensor | torch.Tensor) -> bool:
        """Whether a product with ``other`` comes out in this operand's rotated coordinates if it is left there."""
        turn = other.rotation if isinstance(other, QTensor) else None
        if self.rotation is None or turn is None or not turn.orthogonal:
            return False
        return self.rotation.along(0) == turn.along(0)

    def back(
        self, call: Call, role: str, grad: torch.Tensor, rotated: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the operand's gradient and those of its quantizer's learned state.

        Args:
            call: the layer's call.
            role: ``"input"`` or ``"weight"``.
            grad: gradient of the quantized operand.
            rotated: whether ``grad`` is in rotated coordinates already.
        """
        if self.rotation is not None and not rotated:
            grad = self.rotation.forward(grad)
        learned: dict[str, torch.Tensor] = {}
        if self.value is not None:
            q = call.quantizer("output", role)
            x = self.value if self.rotation is None else self.rotation.forward(self.value)
            grad, learned = q.estimator.backward(x, grad, q.grid, q.grain, call.state_of("output", role))
        elif self.mask is not None:
            grad = grad * self.mask
        return (grad if self.rotation is None else self.rotation.inverse(grad)), learned
