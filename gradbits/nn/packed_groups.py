"""Tensors in groups that share a grid, and what is made of them: the contents of which ``bits`` decides the size."""

from __future__ import annotations

import torch

from gradbits.core.noise import NoiseKey, draw_seed
from gradbits.core.packing import packed_width
from gradbits.kernels.dispatch import Request, run
from gradbits.kernels.quantize import CodeMap
from gradbits.nn.packed import Content
from gradbits.quantizers.grids import place_step

LEAST_WIDTH = 2.0**-110  # of float64 values in a group, above the least step in float32 by what 8 bits divide it by


class Unpackable(Exception):
    """The values have no grid in float32: they are to be kept as they are."""


class Groups(Content):
    r"""Values in groups, each on a grid over its own range, stochastically rounded: unbiased.

    .. math:: \hat x = s\,\mathrm{SR}\big((x - l)/s\big) + l,\qquad l \le \min x,\quad s \ge (\max x - l)/(2^b - 1)

    with l and s rounded outwards to bfloat16, so that a group takes 4 bytes besides its codes and nothing clips.

    Args:
        flat: the values, in memory order.
        bits: bits of a code.
        size: values of a group.
        whole: whether the values are whole numbers in int8 and shall come back as such.
        positive: which of the values, none of them negative, are to be remembered as positive even where they round to
            0; they have a code of their own for it.

    Raises ``Unpackable`` where the grid of a group is not finite in the values' dtype, or float64 values are too small
    for one in float32.

    >>> Groups(torch.tensor([0.0, 3.0, 0.0, 3.0]), bits=2, size=4).flat().tolist()
    [[0.0, 3.0, 0.0, 3.0]]
    """

    def __init__(
        self, flat: torch.Tensor, bits: int, size: int, *, whole: bool = False, positive: torch.Tensor | None = None
    ) -> None:
        self.bits = packed_width(bits) if whole else bits
        self.signed = positive is not None
        rows = _rows(flat, size).float() if whole else _rows(flat, size)
        request = Request(rows.device.type)
        steps, half = 2**self.bits - 1 - self.signed, 2 ** (self.bits - 1)
        if rows.dtype == torch.float64:  # the kernels answer in float32, where what lies beyond would become 0
            low, high = torch.aminmax(rows, dim=1)
            widest = torch.maximum(-low, high)
            if ((widest > 0) & (widest < LEAST_WIDTH)).any():
                raise Unpackable
        else:
            low, high = run("min_max", request, "auto", rows, 0)
        if self.signed:
            low = torch.zeros_like(low) + (low - low)  # 0, or NaN where it is not finite
        if whole:
            step = ((high - low) / steps).ceil()
            low = low if self.signed else torch.minimum(low, 127 - steps * step)  # codes must not pass int8
        else:
            low = _towards(low.bfloat16(), low, down=True).float()
            exact = (high - low) / steps
            step = _towards(exact.bfloat16(), exact, down=False).float()
        step, inverse = place_step(step, 1.0)
        if not whole:
            # nothing that is not finite passes the ranges: no need to look at the values themselves
            ends = torch.stack((low, low + step * steps))
            if not ends.to(flat.dtype).isfinite().all():
                raise Unpackable
        self.low, self.step = low.bfloat16(), step.bfloat16()
        shift, lowest = low.view(-1, 1), self.signed - half
        places = CodeMap(inverse.view(-1, 1), lowest, half - 1, shift, torch.full_like(shift, float(lowest)))
        codes = run("quantize", request, "auto", rows, places, NoiseKey.of(draw_seed()))
        if positive is not None:
            codes.masked_fill_(_rows(positive, size).logical_not(), -half)
        self.count = codes.numel()
        self.codes = codes if packed_width(self.bits) == 8 else run("pack", request, "auto", codes, self.bits)

    @property
    def nbytes(self) -> int:
        return self.codes.numel() + 2 * (self.low.numel() + self.step.numel())

    def flat(self) -> torch.Tensor:
        step, half = self.step.float().view(-1, 1), 2 ** (self.bits - 1)
        codes = self._codes().view(step.shape[0], -1)
        if self.signed:
            return codes.clamp(min=1 - half).float().add_(half - 1).mul_(step)
        return codes.float().mul_(step).add_(self.low.float().view(-1, 1) + step * half)

    def positive(self) -> torch.Tensor:
        """Return which values are positive, where they were stored with it."""
        return self._codes() != -(2 ** (self.bits - 1))

    def _codes(self) -> torch.Tensor:
        if self.codes.dtype != torch.uint8:
            return self.codes
        return run("unpack", Request(self.codes.device.type), "auto", self.codes, self.bits, self.count)


class SignedCodes(Content):
    """Codes of values that are not negative, as they are; code -1 stands for a positive value that rounded to 0."""

    def __init__(self, codes: torch.Tensor, positive: torch.Tensor) -> None:
        self.codes = codes.masked_fill((codes == 0) & positive, -1)

    @property
    def nbytes(self) -> int:
        return self.codes.numel()

    def flat(self) -> torch.Tensor:
        return self.codes.clamp(min=0)

    def positive(self) -> torch.Tensor:
        """Return which values are positive."""
        return self.codes != 0


class Positive(Content):
    """Which values of another content are positive; takes no memory of its own."""

    def __init__(self, inside: Groups | SignedCodes) -> None:
        self.inside = inside

    @property
    def nbytes(self) -> int:
        return 0

    def flat(self) -> torch.Tensor:
        return self.inside.positive()


class LogProbabilities(Content):
    """Logarithms whose exponential is what counts: that is what is kept without bias."""

    def __init__(self, flat: torch.Tensor, bits: int, size: int) -> None:
        self.inside = Groups(flat.float().exp(), bits, size)

    @property
    def nbytes(self) -> int:
        return self.inside.nbytes

    def flat(self) -> torch.Tensor:
        return self.inside.flat().clamp_(min=torch.finfo(torch.float32).tiny).log_()


def _rows(flat: torch.Tensor, size: int) -> torch.Tensor:
    """Return the elements in rows of ``size``; the last row ends with repetitions, which change no range."""
    missing = -flat.numel() % size
    return (torch.cat([flat, flat[-1:].expand(missing)]) if missing else flat).view(-1, size)


def _towards(rounded: torch.Tensor, exact: torch.Tensor, *, down: bool) -> torch.Tensor:
    """Return ``rounded``, or its neighbour where it lies on the wrong side of ``exact``."""
    wide = rounded.float()
    wrong = wide > exact if down else wide < exact
    limit = torch.full_like(rounded, float("-inf") if down else float("inf"))
    return torch.where(wrong, torch.nextafter(rounded, limit), rounded)
