"""The direction-sensitive clip of Unified INT8: clip where the quantized gradient turns away least."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gradbits.core.checks import check_choice, check_integer, check_number
from gradbits.core.grain import Grain, PerTensor
from gradbits.quantizers.grids import Grid
from gradbits.quantizers.ranges import RangeRule, State, largest_magnitude

HISTOGRAM_FROM = 1 << 15  # above this size a search looks at a histogram of magnitudes instead of every element
BINS = 2048


@dataclass(frozen=True)
class Magnitudes:
    """|g| in groups of nearly equal values: count, sum of |g| and sum of g² of each group, in float64."""

    count: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor

    @staticmethod
    def of(g: torch.Tensor) -> Magnitudes:
        """Return every element as a group of its own, or ``BINS`` groups where ``g`` is large."""
        a = g.detach().abs().flatten().float()
        if a.numel() <= HISTOGRAM_FROM:
            a = a.double()
            return Magnitudes(torch.ones_like(a), a, a * a)
        index = (a / a.max() * BINS).to(torch.int32).clamp_(max=BINS - 1)
        a = a.double()
        return Magnitudes(*(torch.bincount(index, weights, BINS).double() for weights in (None, a, a * a)))


def expected_deviation(m: Magnitudes, clip: float, levels: int = 127) -> float:
    r"""Return the deviation that stochastic rounding at clip value c gives on average.

    .. math:: \bar d(c) = 1 - \frac{\langle g, \mathrm{clip}(g, c)\rangle}
              {|g|\,\sqrt{|\mathrm{clip}(g, c)|^2 + s^2 \sum f(1-f)}},\qquad s = c/127

    with f the fractional part of clip(g, c)/s: the mean of the quantized gradient is the clipped one, and rounding adds
    s² f(1-f) to each squared element. A zero gradient has deviation 0.

    Args:
        m: magnitudes of the gradient.
        clip: clip value ``c``, positive.
        levels: positive codes of the grid.

    >>> expected_deviation(Magnitudes.of(torch.tensor([1.0, -1.0])), 1.0)
    0.0
    """
    total = float(m.second.sum())
    if total <= 0.0 or clip <= 0.0:
        return 0.0
    s = clip / levels
    mean = m.first / m.count.clamp(min=1.0)
    inside = mean <= clip
    dot = float(torch.where(inside, m.second, clip * m.first).sum())
    norm = float(torch.where(inside, m.second, clip * clip * m.count).sum())
    f = torch.remainder(mean / s, 1.0)
    # below one step f = |g|/s, so the sum over a group needs only its two moments
    rounding = torch.where(mean < s, m.first / s - m.second / (s * s), m.count * f * (1.0 - f))
    noise = float(torch.where(inside, rounding, torch.zeros_like(rounding)).clamp(min=0.0).sum())
    return min(max(1.0 - dot / math.sqrt(total * (norm + s * s * noise)), 0.0), 2.0)


def deviation(g: torch.Tensor, quantized: torch.Tensor) -> float:
    r"""Return :math:`d_c = 1 - \langle g,\hat g\rangle / (|g||\hat g|)` of two tensors; 0 where either is zero.

    >>> deviation(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
    1.0
    """
    a, b = g.detach().double().flatten(), quantized.detach().double().flatten()
    norms = float(a.norm() * b.norm())
    return 1.0 - float(a @ b) / norms if norms > 0.0 else 0.0


def search_grid(m: Magnitudes, largest: float, levels: int = 127, points: int = 16, steps: int = 8) -> float:
    """Return the clip value of least expected deviation: a logarithmic grid on [0.05, 1] max|g|, then golden sections.

    >>> _ = torch.manual_seed(0); g = torch.cat([torch.randn(200_000), torch.tensor([300.0])])
    >>> 80 < search_grid(Magnitudes.of(g), 300.0) < 130
    True
    """
    grid = [largest * 0.05 ** (1.0 - i / (points - 1)) for i in range(points)]
    values = [expected_deviation(m, c, levels) for c in grid]
    best = min(range(points), key=values.__getitem__)
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, points - 1)]
    ratio = (math.sqrt(5.0) - 1.0) / 2.0
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = expected_deviation(m, left, levels), expected_deviation(m, right, levels)
    for _ in range(steps):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = expected_deviation(m, left, levels)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = expected_deviation(m, right, levels)
    found, value = min(((left, at_left), (right, at_right)), key=lambda pair: pair[1])
    return min(found, largest) if value < values[best] else grid[best]


def search_descent(
    g: torch.Tensor, start: float, largest: float, levels: int = 127, steps: int = 20, rate: float = 0.1
) -> float:
    r"""Return a clip value by gradient descent on d_c, with the straight-through derivative of the quantized gradient.

    .. math:: \frac{\partial \hat g}{\partial c} = \mathrm{sign}(g)\ \text{if}\ |g|>c,\ \text{else}\
              \frac{q - \mathrm{clip}(g,c)/s}{127}

    The step is relative: c moves by ``rate`` times its value against the derivative's sign, halved whenever the sign
    flips, because the derivative's size says little (the paper's step size is not known to us).

    Args:
        g: gradient.
        start: first clip value.
        largest: max|g|; the result is at most this.
        levels: positive codes of the grid.
        steps: descent steps.
        rate: first relative step.
    """
    a = g.detach().abs().double().flatten()
    norm_a = float(a.norm())
    c, previous = min(start, largest), 0.0
    for _ in range(steps):
        s = c / levels
        clipped = a.clamp(max=c)
        q = torch.round(clipped / s)
        quantized = q * s
        slope = torch.where(a > c, torch.ones_like(a), (q - clipped / s) / levels)
        norm_b = float(quantized.norm())
        if norm_a == 0.0 or norm_b == 0.0:
            break
        dot = float(a @ quantized)
        derivative = -(float(a @ slope) / (norm_a * norm_b) - dot * float(quantized @ slope) / (norm_a * norm_b**3))
        if derivative * previous < 0.0:
            rate *= 0.5
        previous = derivative
        c = min(max(c * (1.0 - math.copysign(rate, derivative)), 1e-3 * largest), largest)
    return c


@dataclass(frozen=True, kw_only=True)
class DirectionClip(RangeRule):
    r"""Direction-sensitive gradient clipping (DSGC): :math:`c = \arg\min_c d_c`, refreshed every T steps.

    Args:
        refresh: ``T``, steps between two searches; 100 is our default (unconfirmed in the paper).
        search: ``"grid"`` minimises the expected deviation on a grid, then by golden sections; ``"descent"`` follows
            the paper's straight-through derivative.
        guard: search again at once when max|g| exceeds ``guard`` times the clip value found when max|g| was
            last measured: a stale clip at a jump of the gradient's size would clip nearly everything.

    References:
        Zhu et al., Towards Unified INT8 Training for Convolutional Neural Network, CVPR 2020, arXiv:1912.12607.
    """

    refresh: int = 100
    search: str = "grid"
    guard: float = 2.0

    by_magnitude = True

    def __post_init__(self) -> None:
        check_integer(self.refresh, "DirectionClip.refresh", 1)
        check_choice(self.search, "DirectionClip.search", ("grid", "descent"))
        check_number(self.guard, "DirectionClip.guard", 1.0, open_low=True)

    @property
    def can_clip(self) -> bool:
        return True

    def init_state(self, groups: int) -> State:
        nan = float("nan")
        return {
            "clip": torch.full((1,), nan),
            "largest": torch.full((1,), nan),
            "deviation": torch.zeros(1),
            "age": torch.zeros(1, dtype=torch.int64),
        }

    def limits(self, x: torch.Tensor, grain: Grain, state: State, update: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return self._limits(x, grain, state, update, 127)

    def limits_on(
        self, grid: Grid, x: torch.Tensor, grain: Grain, state: State, update: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._limits(x, grain, state, update, grid.levels[1])

    def _limits(
        self, x: torch.Tensor, grain: Grain, state: State, update: bool, levels: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape, clip = grain.scale_shape(x.shape), self._clip(x, grain, state, update, levels)
        return (-clip).expand(shape).clone(), clip.expand(shape).clone()

    def width(self, grid: Grid, x: torch.Tensor, state: State, update: bool) -> torch.Tensor:
        return self._clip(x, PerTensor(), state, update, grid.levels[1])

    def _clip(self, x: torch.Tensor, grain: Grain, state: State, update: bool, levels: int) -> torch.Tensor:
        """Return c as one number; where ``x`` is not finite, its largest magnitude, and the state stays."""
        magnitude = largest_magnitude(x, grain)
        peak = magnitude.reshape(()) if magnitude.numel() == 1 else magnitude.amax() if magnitude.numel() else None
        if peak is None:
            return torch.zeros((), device=x.device)
        largest = float(peak)
        if not math.isfinite(largest):
            return peak
        known = float(state["clip"])
        if update and largest > 0.0:
            stale = not math.isfinite(known) or int(state["age"]) >= self.refresh
            if stale or largest > self.guard * float(state["largest"]):
                self._search_(x, largest, known, state, levels)
                known = float(state["clip"])
            state["age"] += 1
        return torch.full((), known, device=x.device) if math.isfinite(known) and known < largest else peak

    def _search_(self, x: torch.Tensor, largest: float, known: float, state: State, levels: int) -> None:
        m = Magnitudes.of(x)
        if self.search == "grid":
            clip = search_grid(m, largest, levels)
        else:
            clip = search_descent(x, known if math.isfinite(known) else largest, largest, levels)
        state["clip"].fill_(clip)
        state["largest"].fill_(largest)
        state["deviation"].fill_(expected_deviation(m, clip, levels))
        state["age"].zero_()
