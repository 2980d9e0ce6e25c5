"""Rotations before the grid: how a quantizer finds the invertible map that spreads large values over small ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from gradbits.core.qtensor import Rotation
from gradbits.core.spec import Spec
from gradbits.quantizers.ranges import State


@dataclass(frozen=True, kw_only=True)
class RotationRule(Spec):
    """How a quantizer's rotation is found; the base of ``Householder`` and ``Hadamard``.

    The axis it mixes is part of what it is, ``axis`` 0 for rows and 1 for input features, in the layout of weights
    [output features, input features, ...], inputs and gradients [rows, features, ...]; layers with another layout
    translate it.
    """

    axis: ClassVar[int]
    orthogonal: ClassVar[bool]

    def init_state(self) -> State:
        """Return the state one layer keeps for this rotation; empty where it remembers nothing."""
        return {}

    def settle(
        self, length: int, errors: Sequence[Callable[[Rotation], torch.Tensor]], states: Sequence[State]
    ) -> None:
        """Settle, once, what operands that share this rotation along their contracted axis must agree on.

        Args:
            length: of the contracted axis.
            errors: for each operand, the quantization error (Frobenius norm) that a rotation along axis 1 would leave.
            states: of the operands; changed in place.
        """
        return None

    def apply(self, x: torch.Tensor, axis: int, bits: int, state: State) -> tuple[torch.Tensor, Rotation | None]:
        """Return the rotated ``x`` and the rotation, or ``x`` and None where rotating does not pay.

        Args:
            x: values.
            axis: the axis to mix, in the layout of ``x``.
            bits: bits of the codes to come.
            state: from ``init_state``.
        """
        raise NotImplementedError
