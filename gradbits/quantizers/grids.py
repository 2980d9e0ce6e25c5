"""Uniform grids: from a range to scale, zero point and the map from values to codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from gradbits.core.checks import check_bits, check_choice
from gradbits.core.spec import Spec
from gradbits.kernels.quantize import TINY, CodeMap, place_step


@dataclass(frozen=True, kw_only=True)
class GridValues:
    """A grid placed on a range: how values become codes and codes become values.

    Args:
        code_map: from values to codes.
        scale, zero_point, offset: from codes to values, see ``QTensor``.
        rest: the grid of the next digit, which takes what this one leaves; only the last digit rounds stochastically.
    """

    code_map: CodeMap
    scale: torch.Tensor
    zero_point: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    rest: GridValues | None = None


@dataclass(frozen=True, kw_only=True)
class Grid(Spec):
    """The representable values of a quantizer; the base of the uniform grids.

    Args:
        bits: bits of one code, 2 to 8.
    """

    least_bits: ClassVar[int] = 2
    bits: int = 8

    def __post_init__(self) -> None:
        check_bits(self.bits, f"{type(self).__name__}.bits", self.least_bits)

    @property
    def digits(self) -> int:
        """Codes that one value takes."""
        return 1

    @property
    def levels(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        half = 1 << (self.bits - 1)
        return -half, half - 1

    def place(self, low: torch.Tensor, high: torch.Tensor) -> GridValues:
        """Return the grid on [``low``, ``high``]; where the range is not finite, the scale is NaN."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Symmetric(Grid):
    r"""Codes :math:`-(2^{b-1}-1) \dots 2^{b-1}-1` around an exact zero, :math:`s = \max(|l|,|h|)/(2^{b-1}-1)`.

    >>> grid = Symmetric(bits=4).place(torch.tensor([-7.0]), torch.tensor([3.5]))
    >>> grid.scale.item(), grid.code_map.low, grid.code_map.high
    (1.0, -7, 7)
    """

    @property
    def levels(self) -> tuple[int, int]:
        largest = (1 << (self.bits - 1)) - 1
        return -largest, largest

    def place(self, low: torch.Tensor, high: torch.Tensor) -> GridValues:
        largest = (1 << (self.bits - 1)) - 1
        scale, inverse = place_step(torch.maximum(-low, high), largest)
        return GridValues(code_map=CodeMap(inverse, -largest, largest), scale=scale)


@dataclass(frozen=True, kw_only=True)
class Unsigned(Grid):
    r"""Levels :math:`0 \dots 2^b - 1` above an exact zero, :math:`s = h/(2^b-1)`: for values that are not negative.

    ``levels`` counts in steps from zero; the codes themselves are half of all levels lower, so that 8 bits fit int8.

    >>> grid = Unsigned(bits=8).place(torch.tensor([0.0]), torch.tensor([510.0]))
    >>> grid.scale.item(), grid.zero_point.item(), Unsigned(bits=8).levels
    (2.0, -128.0, (0, 255))
    """

    @property
    def levels(self) -> tuple[int, int]:
        return 0, (1 << self.bits) - 1

    def place(self, low: torch.Tensor, high: torch.Tensor) -> GridValues:
        half = 1 << (self.bits - 1)
        scale, inverse = place_step(high, 2 * half - 1)
        zero_point = torch.full_like(high, float(-half))
        code_map = CodeMap(inverse, -half, half - 1, zero=zero_point)
        return GridValues(code_map=code_map, scale=scale, zero_point=zero_point)


@dataclass(frozen=True, kw_only=True)
class TwosComplement(Grid):
    r"""All :math:`2^b` codes :math:`-2^{b-1} \dots 2^{b-1}-1` around an exact zero, :math:`s = \max(-l, h)/2^{b-1}`.

    Values above :math:`(2^{b-1}-1)\,s` take the highest code.

    >>> grid = TwosComplement(bits=4).place(torch.tensor([-4.0]), torch.tensor([3.5]))
    >>> grid.scale.item(), grid.code_map.low, grid.code_map.high
    (0.5, -8, 7)
    """

    def place(self, low: torch.Tensor, high: torch.Tensor) -> GridValues:
        scale, inverse = place_step(torch.maximum(-low, high), 1 << (self.bits - 1))
        return GridValues(code_map=CodeMap(inverse, *self.levels), scale=scale)


@dataclass(frozen=True, kw_only=True)
class Affine(Grid):
    r"""All :math:`2^b` codes :math:`-2^{b-1} \dots 2^{b-1}-1` spread over the range, :math:`s = (h-l)/(2^b-1)`.

    Args:
        bits: bits of one code, 2 to 8.
        zero: how real zero is represented.
            ``"none"``: the range is used as it is, zero falls where it falls.
            ``"nudge"``: the range is extended to hold zero and shifted by up to half a step so that zero is a code
            (Jacob et al.); values at one end may clip by half a step.
            ``"widen"``: the range is extended to hold zero and its upper end is moved out until zero is a code
            (StatQuant); nothing clips.

    References:
        Jacob et al., arXiv:1712.05877; Chen et al., A Statistical Framework for Low-bitwidth Training of Deep Neural
        Networks, NeurIPS 2020, arXiv:2010.14298.

    >>> grid = Affine(bits=8, zero="nudge").place(torch.tensor([-0.4]), torch.tensor([2.15]))
    >>> round(grid.scale.item(), 6), int(grid.zero_point.item()) + 128
    (0.01, 40)
    """

    zero: str = "none"

    def __post_init__(self) -> None:
        Grid.__post_init__(self)
        check_choice(self.zero, "Affine.zero", ("none", "nudge", "widen"))

    def place(self, low: torch.Tensor, high: torch.Tensor) -> GridValues:
        half = 1 << (self.bits - 1)
        steps = 2 * half - 1
        if self.zero == "none":
            scale, inverse = place_step(high - low, steps)
            code_map = CodeMap(inverse, -half, half - 1, shift=low, zero=torch.full_like(low, float(-half)))
            return GridValues(code_map=code_map, scale=scale, offset=low + half * scale)
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        scale, inverse = place_step(high - low, steps)
        # rank of real zero among the codes, from 0 to 2^b - 1, not by way of the rounded scale: that would miss ties
        width64 = high.double() - low.double()
        rank = torch.nan_to_num(-low.double() * steps / width64.clamp(min=TINY * steps))
        if self.zero == "nudge":
            rank = torch.floor(rank + 0.5).clamp(0, steps)
        else:
            # the least step for which both ends lie on the grid; any negative value needs a code below zero's
            rank = torch.maximum(torch.floor(rank), (low < 0).double()).clamp(max=steps)
            below, above = -low.double() / rank.clamp(min=1.0), high.double() / (steps - rank).clamp(min=1.0)
            width = torch.maximum(below, above)
            scale, inverse = place_step((width * steps).float(), steps)
        zero_point = (rank - half).float()
        return GridValues(
            code_map=CodeMap(inverse, -half, half - 1, zero=zero_point), scale=scale, zero_point=zero_point
        )
