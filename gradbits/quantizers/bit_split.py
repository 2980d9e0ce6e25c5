"""Bit splitting: a gradient as two signed 4-bit digits, so that its products need no wider integers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradbits.core.checks import check_integer, check_number
from gradbits.kernels.quantize import CodeMap, place_step
from gradbits.quantizers.grids import Grid, GridValues


@dataclass(frozen=True, kw_only=True)
class BitSplit(Grid):
    r"""Two digits of b bits: :math:`\hat g = \Delta\,(B\,\mathrm{hi} + \mathrm{lo})`, hi to nearest, lo as rounded.

    .. math:: \Delta = \frac{\max|g|}{B L}, \quad t = \frac{g}{\Delta}, \quad \mathrm{hi} = \mathrm{round}(t/B), \quad
              \mathrm{lo} = \mathrm{SR}(t - B\,\mathrm{hi})

    with digits from -L to L = 2^{b-1} - 1 and base B = 2 L: at 4 bits ±7 and 14, 197 levels. B is the largest base
    whose remainder, at most L, never leaves the digit's range under stochastic rounding, so the sum is unbiased.

    Args:
        bits: of one digit.
        limit: largest digit, or None for L. The authors' code clips at 6, which takes up to 8.2 % off the largest
            values; the argument exists to reproduce that.
        top: t of max|g|, or None for B L. Their BERT code spreads 255 levels here, 127.5, and clips at 105.

    References:
        Xi et al., Training Transformers with 4-bit Integers, NeurIPS 2023, arXiv:2306.11987.

    >>> grid = BitSplit().place(torch.tensor([-98.0]), torch.tensor([50.0]))
    >>> grid.scale.item(), grid.rest.scale.item(), grid.code_map.high
    (14.0, 1.0, 7)
    """

    bits: int = 4
    limit: int | None = None
    top: float | None = None

    def __post_init__(self) -> None:
        Grid.__post_init__(self)
        if self.limit is not None:
            check_integer(self.limit, "BitSplit.limit", 1, self._largest)
        if self.top is not None:
            check_number(self.top, "BitSplit.top", 0.0, open_low=True)

    @property
    def _largest(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def base(self) -> int:
        """``B``, what the higher digit counts."""
        return 2 * self._largest

    @property
    def digits(self) -> int:
        return 2

    @property
    def levels(self) -> tuple[int, int]:
        limit = self.limit or self._largest
        return -limit, limit

    def place(self, low: torch.Tensor, high: torch.Tensor) -> GridValues:
        step, inverse = place_step(torch.maximum(-low, high), self.top or self.base * self._largest)
        rest = GridValues(code_map=CodeMap(inverse, *self.levels), scale=step)
        return GridValues(code_map=CodeMap(inverse / self.base, *self.levels), scale=step * self.base, rest=rest)
