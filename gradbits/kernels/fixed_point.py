r"""Fixed-point multipliers: how an int32 sum becomes a code of the next layer without floating point.

.. math:: M = M_0\,2^{-31}\,2^{-n}, \qquad M_0 \in [2^{30}, 2^{31})
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gradbits.core.checks import check_choice
from gradbits.core.errors import ArgumentError

ROUNDINGS = ("single", "double")
LARGEST_SHIFT = 31  # 31 + n bits are shifted out of an int64


@dataclass(frozen=True)
class Multiplier:
    r"""Positive real numbers as integers, :math:`M = M_0\,2^{-31-n}`; one, or one for each output channel.

    Args:
        m0: int64 ``M_0``, from 2^30 to 2^31 - 1, or 0 for a number too small to matter.
        shift: int64 ``n``, from -30 (M below 2^30) to 31.
    """

    m0: torch.Tensor
    shift: torch.Tensor

    @classmethod
    def of(cls, real: torch.Tensor | float) -> Multiplier:
        """Return the multipliers next to the positive numbers ``real``; halves go up.

        Raises:
            ArgumentError: not positive, not finite, or 2^30 and more.

        References:
            Jacob et al., arXiv:1712.05877, section 2.2.

        >>> m = Multiplier.of(0.1); m.m0.item(), m.shift.item()
        (1717986918, 3)
        """
        given = torch.as_tensor(real, dtype=torch.float64)
        if not bool((torch.isfinite(given) & (given > 0) & (given < 2.0**30)).all()):
            raise ArgumentError(f"real={given.tolist()!r}: must be positive, finite and below 2^30")
        mantissa, exponent = torch.frexp(given)
        m0 = torch.floor(mantissa * 2.0**31 + 0.5).to(torch.int64)
        full = m0 == 1 << 31
        m0, shift = torch.where(full, m0 >> 1, m0), -(exponent.to(torch.int64) + full)
        tiny = shift > LARGEST_SHIFT  # an int32 times so small a number is below one half
        return cls(torch.where(tiny, 0, m0), torch.where(tiny, LARGEST_SHIFT, shift))

    def view(self, *shape: int) -> Multiplier:
        """Return the multipliers in another shape, to broadcast against sums."""
        return Multiplier(self.m0.view(*shape), self.shift.view(*shape))


def rounding_shift(value: torch.Tensor, bits: torch.Tensor | int) -> torch.Tensor:
    r"""Return the integers ``value`` divided by :math:`2^{bits}`, rounded to nearest, halves away from zero.

    A plain arithmetic shift would give -1 for -12/8 and pull every sum upwards.

    Args:
        value: int64, below 2^62 in magnitude.
        bits: from 0 to 62.

    >>> rounding_shift(torch.tensor([-12, 12, -4, 4, -13, -11]), 3).tolist()
    [-2, 2, -1, 1, -2, -1]
    """
    shift = torch.as_tensor(bits, dtype=torch.int64, device=value.device)
    half = torch.bitwise_left_shift(torch.ones_like(shift), shift) >> 1
    away = (value >> 63) & -(shift > 0).to(torch.int64)  # -1 below zero
    return torch.bitwise_right_shift(away.add_(value).add_(half), shift)


def high_multiply(value: torch.Tensor, m0: torch.Tensor) -> torch.Tensor:
    r"""Return :math:`\mathrm{round}(v\,M_0/2^{31})` saturated to int32: the doubling high product of ARM processors.

    Halves go up, as the instruction rounds.

    Args:
        value: int64 that hold int32 numbers.
        m0: int64 that hold int32 numbers.

    >>> high_multiply(torch.tensor([-(1 << 31)]), torch.tensor([-(1 << 31)])).item() == (1 << 31) - 1
    True
    """
    product = value * m0
    # gemmlowp: nudge by 2^30, or by 1 - 2^30 below zero, then divide towards zero
    nudge = torch.where(product >= 0, 1 << 30, 1 - (1 << 30))
    return torch.div(product + nudge, 1 << 31, rounding_mode="trunc").clamp(max=(1 << 31) - 1)


def requantize(total: torch.Tensor, multiplier: Multiplier, rounding: str = "single") -> torch.Tensor:
    r"""Return :math:`\mathrm{round}(M \cdot total)` in int64, computed in integers alone.

    Args:
        total: int32 or int64 sums, within int32.
        multiplier: ``M``, broadcastable to ``total``.
        rounding: ``"single"`` rounds the exact product once, halves away from zero; ``"double"`` rounds the high
            product and then the shift, as gemmlowp and Jacob et al. do, which differs by one code in few cases.

    Raises:
        ArgumentError: an unknown rounding.

    >>> total = torch.tensor([1000, -1005])
    >>> requantize(total, Multiplier.of(0.1)).tolist(), requantize(total, Multiplier.of(0.1), "double").tolist()
    ([100, -100], [100, -101])
    """
    check_choice(rounding, "rounding", ROUNDINGS)
    wide = total.to(torch.int64)
    if rounding == "single":
        return rounding_shift(wide * multiplier.m0, multiplier.shift + 31)
    left = (-multiplier.shift).clamp(min=0)  # a multiplier of one and more shifts to the left first
    raised = torch.bitwise_left_shift(wide, left).clamp(-(1 << 31), (1 << 31) - 1)
    return rounding_shift(high_multiply(raised, multiplier.m0), multiplier.shift.clamp(min=0))


def common_multipliers(reals: list[float]) -> tuple[list[int], int]:
    r"""Return integers and one shift s with :math:`r_i \approx m_i\,2^{-s}`: numbers whose products are added up.

    The largest has 31 bits.

    Raises:
        ArgumentError: a number is not positive and finite, or 2^30 and more.

    >>> common_multipliers([0.5, 0.25])
    ([1073741824, 536870912], 31)
    """
    for real in reals:
        if not (math.isfinite(real) and 0 < real < 2.0**30):
            raise ArgumentError(f"reals={reals!r}: must be positive, finite and below 2^30")
    shift = min(31 - math.frexp(max(reals))[1], 60)
    integers = [math.floor(math.ldexp(real, shift) + 0.5) for real in reals]
    if max(integers) == 1 << 31:
        shift -= 1
        integers = [math.floor(math.ldexp(real, shift) + 0.5) for real in reals]
    return integers, shift
