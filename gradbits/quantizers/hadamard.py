"""Block Hadamard rotation: outliers among the features spread over their block before they are quantized."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from gradbits.core.checks import check_axis, check_integer
from gradbits.core.errors import ArgumentError
from gradbits.core.qtensor import Rotation
from gradbits.quantizers.ranges import State
from gradbits.quantizers.rotation import RotationRule

RADIX_BITS = 6  # one stage mixes up to 64 values: a small matrix product is faster than six passes over memory


def hadamard(x: torch.Tensor, size: int, axis: int = -1) -> torch.Tensor:
    r"""Return ``x`` with each block of ``size`` entries along ``axis`` multiplied by the normalised Hadamard matrix.

    .. math:: H_1 = [1], \qquad H_{2n} = \tfrac{1}{\sqrt 2}\begin{pmatrix} H_n & H_n \\ H_n & -H_n \end{pmatrix}

    symmetric and orthogonal, so the function is its own inverse. Computed by butterflies of radix up to 64.

    Args:
        x: floating-point values.
        size: a power of two that divides the axis.
        axis: the axis to mix.

    Raises:
        ArgumentError: it is not, or does not.

    >>> hadamard(torch.tensor([2.0, 0.0, 0.0, 0.0]), 4).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    axis = check_axis(axis, "axis", x.dim())
    if size < 1 or size & (size - 1) or x.shape[axis] % size:
        raise ArgumentError(f"size={size}: must be a power of two that divides axis {axis} of {x.shape[axis]}")
    if size == 1 or x.numel() == 0:
        return x
    last = x.movedim(axis, -1)
    if axis != x.dim() - 1 and last.is_contiguous():
        return hadamard(last, size).movedim(-1, axis)
    y, done, inner = x, 1, x.shape[axis + 1 :].numel()
    bits = size.bit_length() - 1
    stages = -(-bits // RADIX_BITS)
    for number in range(stages):  # of nearly equal radix
        stage = 1 << ((bits + number) // stages)
        signs, width = _signs(stage, x), done * inner
        y = y.reshape(-1, stage) @ signs if width == 1 else torch.matmul(signs, y.reshape(-1, stage, width))
        done *= stage
    return y.mul_(1.0 / math.sqrt(size)).reshape(x.shape)


def _signs(size: int, like: torch.Tensor) -> torch.Tensor:
    """Return the Hadamard matrix of ones and minus ones: the parity of the common bits of row and column."""
    index = torch.arange(size, device=like.device)
    common = index.unsqueeze(1) & index
    for shift in (4, 2, 1):
        common = common ^ (common >> shift)
    return (1 - 2 * (common & 1)).to(like.dtype)


@dataclass(frozen=True)
class HadamardBlocks:
    """The block-diagonal Hadamard matrix along one axis.

    Args:
        size: of one block; 1 leaves values as they are.
        axis: the axis it mixes.
    """

    size: int
    axis: int = 1

    @property
    def orthogonal(self) -> bool:
        """True: it cancels in a product whose operands share it."""
        return True

    def along(self, axis: int) -> HadamardBlocks:
        """Return the same map along another axis."""
        return replace(self, axis=axis)

    def of_group(self, group: int) -> HadamardBlocks:
        """Return the map itself: blocks divide the features, whatever rows are."""
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rotated ``x`` in float32."""
        x = x.float()
        return hadamard(x, self.size, self.axis)

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        """Return the same: the matrix is its own inverse."""
        return self.forward(x)

    def column_norms(self, x: torch.Tensor) -> torch.Tensor:
        """Return ones."""
        return x.new_ones((1,) * x.dim())


def sizes_of(length: int, largest: int) -> list[int]:
    """Return the powers of two up to ``largest`` that divide ``length``.

    >>> sizes_of(48, 1024)
    [1, 2, 4, 8, 16]
    """
    return [1 << k for k in range(largest.bit_length()) if (1 << k) <= largest and length % (1 << k) == 0]


@dataclass(frozen=True, kw_only=True)
class Hadamard(RotationRule):
    r"""The rotation of HQ: :math:`X W^\top = (X H)(W H)^\top` with a block-diagonal H over the input features.

    Args:
        size: of one block, a power of two; smaller where it does not divide the number of features. 0 searches on the
            first batch: the size of least :math:`|X_q - X|_F\,|W_q - W|_F` among the powers of two that divide it.
        largest: of the sizes that are searched.

    References:
        Xi et al., Training Transformers with 4-bit Integers, NeurIPS 2023, arXiv:2306.11987.
    """

    axis: ClassVar[int] = 1
    orthogonal: ClassVar[bool] = True

    size: int = 0
    largest: int = 1024

    def __post_init__(self) -> None:
        for name, low in (("size", 0), ("largest", 1)):
            value = check_integer(getattr(self, name), f"Hadamard.{name}", low)
            if value & (value - 1):
                raise ArgumentError(f"Hadamard.{name}={value}: must be a power of two")

    def init_state(self) -> State:
        return {"hadamard": torch.zeros(1, dtype=torch.int64)}  # 0: not settled yet

    def settle(
        self, length: int, errors: Sequence[Callable[[Rotation], torch.Tensor]], states: Sequence[State]
    ) -> None:
        if all(bool(state["hadamard"] > 0) for state in states):
            return
        sizes = sizes_of(length, self.size or self.largest)
        sizes = sizes[-1:] if self.size else sizes
        costs = [math.prod(float(error(HadamardBlocks(size))) for error in errors) for size in sizes]
        if not all(math.isfinite(cost) for cost in costs):
            return  # a batch with NaN decides nothing
        best = sizes[min(range(len(sizes)), key=costs.__getitem__)]
        for state in states:
            state["hadamard"].fill_(best)

    def apply(self, x: torch.Tensor, axis: int, bits: int, state: State) -> tuple[torch.Tensor, Rotation | None]:
        turn = HadamardBlocks(max(int(state["hadamard"]), 1), axis)
        return turn.forward(x), turn
