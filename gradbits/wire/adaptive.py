r"""What codecs with adaptive levels share: statistics of normalized gradients in, levels out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradbits.core.checks import check_instance, check_integer
from gradbits.core.errors import ArgumentError
from gradbits.wire.bucketed import NORMS, LevelCodec, exponential_magnitudes, separate, uniform_magnitudes, with_mirror
from gradbits.wire.codec import State, check_values
from gradbits.wire.density import Density
from gradbits.wire.levels import spread_levels
from gradbits.wire.schedule import LevelSchedule
from gradbits.wire.statistics import (
    MIXTURE,
    SINGLE,
    bucket_moments,
    density_of,
    mixture_statistics,
    single_statistics,
)

LEVELS = "levels"


@dataclass(frozen=True, kw_only=True)
class AdaptiveCodec(LevelCodec):
    r"""A codec whose levels follow the density of normalized coordinates; ``state["levels"]`` holds them.

    Statistics of a gradient are a float64 vector; ranks add theirs up, and each then calls ``adapt`` with the sum. All
    solve the same problem in float64, so all have the same levels. Before the first time the levels are
    :math:`\pm 2^{-j}`.

    Args:
        bits, bucket, norm, layout: as for ``LevelCodec``.
        norm_power: k of the weight :math:`\|v_n\|^k` of bucket n in the density. 2 minimizes the squared error of the
            gradient; 1 is what the authors' code does.
        norm_less: one truncated normal for all buckets without weights (the variants named ALQ-N, ALQG-N and AMQ-N).
        ignore_small: whether a short last bucket is left out of the statistics.
        schedule: when the levels are adapted.
    """

    norm_power: int = 2
    norm_less: bool = False
    ignore_small: bool = False
    schedule: LevelSchedule = LevelSchedule()

    def __post_init__(self) -> None:
        LevelCodec.__post_init__(self)
        check_integer(self.norm_power, "norm_power", 1, 2)
        check_instance(self.norm_less, "norm_less", bool)
        check_instance(self.ignore_small, "ignore_small", bool)
        check_instance(self.schedule, "schedule", LevelSchedule)

    @property
    def central(self) -> bool:
        """Whether the magnitudes do not hold a zero."""
        return self.layout == "signed"

    def init_state(self) -> State:
        return {LEVELS: separate(with_mirror(exponential_magnitudes(self.bits, self.layout, 0.5), self.layout))}

    def levels(self, state: State | None = None) -> torch.Tensor:
        if not state:
            return self.init_state()[LEVELS]
        count = (1 << self.bits) - (not self.central)
        levels = state.get(LEVELS)
        if levels is None or levels.shape != (count,) or levels.dtype != torch.float32:
            seen = "missing" if levels is None else f"{levels.dtype} of shape {list(levels.shape)}"
            raise ArgumentError(f"state['levels']: {seen}; {self.name!r} has {count} float32 levels")
        if float(levels[0]) != -1.0 or float(levels[-1]) != 1.0 or not bool((levels.diff() > 0).all()):
            raise ArgumentError(f"state['levels']: {levels.tolist()}: must increase strictly from -1 to 1")
        return levels

    def statistics(self, x: torch.Tensor) -> torch.Tensor:
        moments = bucket_moments(check_values(x), self.bucket, NORMS[self.norm], self.ignore_small)
        return single_statistics(moments) if self.norm_less else mixture_statistics(moments, self.norm_power)

    def adapt(self, state: State, statistics: torch.Tensor) -> State:
        self.check_statistics(statistics, SINGLE if self.norm_less else MIXTURE)
        levels = self.levels(state)
        density = density_of(statistics)
        if density is None or levels.numel() <= 2 + (not self.central):
            return state  # nothing was seen, or only the ends and zero are there
        return {**state, LEVELS: separate(self.solve(density, levels.cpu().double()))}

    def is_due(self, step: int) -> bool:
        return self.schedule.is_due(step)

    def solve(self, density: Density, levels: torch.Tensor) -> torch.Tensor:
        """Return the best float64 levels for ``density`` on [-1, 1], given the present ones."""
        raise NotImplementedError

    def magnitudes(self, levels: torch.Tensor) -> torch.Tensor:
        """Return the magnitudes of symmetric ``levels``, the inverse of ``with_mirror``."""
        return levels[levels.numel() // 2 :].clone()

    def starts(self, density: Density, present: torch.Tensor) -> list[torch.Tensor]:
        """Return magnitudes to start from: present ones, even, exponential, quantiles, and those for many levels."""
        count = present.numel() + self.central
        cut = int(self.central)  # without a zero level, the points of the half line less its end 0
        return [
            present,
            uniform_magnitudes(self.bits, self.layout),
            exponential_magnitudes(self.bits, self.layout, 0.5),
            _apart(density.quantiles(count)[cut:]),
            _apart(spread_levels(density, count)[cut:]),
        ]


def _apart(grid: torch.Tensor) -> torch.Tensor:
    """Return a sorted grid with equal neighbours moved a little towards an even grid; the ends stay."""
    even = torch.linspace(float(grid[0]), float(grid[-1]), grid.numel(), dtype=torch.float64)
    return grid if bool((grid.diff() > 1e-12).all()) else 0.999 * grid + 0.001 * even
