"""The magnitude-aware clip of Distribution-Adaptive INT8: one clip value per channel, by the channel's distribution."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradbits.core.checks import check_choice, check_integer, check_number
from gradbits.core.grain import Grain, PerBlock
from gradbits.quantizers.ranges import RangeRule, State, min_max

BISECTIONS = 40  # halves the interval to below float32's resolution


@dataclass(frozen=True)
class ChannelStatistics:
    """What the classifier looks at, one value per channel: max|g|, the standard deviation, the fraction beyond it."""

    largest: torch.Tensor
    sigma: torch.Tensor
    outside: torch.Tensor


def channel_statistics(x: torch.Tensor, grain: Grain) -> ChannelStatistics:
    r"""Return :math:`\max|g|`, :math:`\sigma` and :math:`P(|g| > \sigma)` of what shares one scale, flat.

    >>> from gradbits.core.grain import PerTensor
    >>> s = channel_statistics(torch.tensor([3.0, -1.0, 1.0, -3.0, 0.0]), PerTensor())
    >>> s.largest.item(), s.sigma.item(), round(s.outside.item(), 3)
    (3.0, 2.0, 0.4)
    """
    low, high = min_max(x, grain)
    largest = torch.maximum(-low, high)
    if x.numel() == 0:
        return ChannelStatistics(*(largest.flatten(),) * 3)
    if isinstance(grain, PerBlock):
        x = grain.split(x)
        largest = largest.view(-1, 1)
    shared = [axis for axis, n in enumerate(largest.shape) if n == 1]
    count = x.numel() // largest.numel()
    # of values in [-1, 1], so that neither tiny nor huge gradients leave float32's range when squared
    unit = torch.where(largest > 0, 1.0 / largest.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
    scaled = x * unit
    mean = scaled.sum(dim=shared, keepdim=True) / count
    square = torch.linalg.vector_norm(scaled, dim=shared, keepdim=True).square() / count
    sigma = (square - mean * mean).clamp_(min=0.0).sqrt_()
    outside = (scaled.abs_() > sigma).sum(dim=shared) / count
    return ChannelStatistics(largest.flatten(), (sigma * largest).flatten(), outside.float().flatten())


def exact_clip(core: torch.Tensor, mass: torch.Tensor, alpha: float) -> torch.Tensor:
    r"""Return the clip value of least magnitude-aware error for a piecewise uniform density, by bisection.

    With the density a on :math:`|g| < \epsilon` and b on :math:`\epsilon < |g| < 1`, the error
    :math:`\int |g - \hat g|\, e^{\alpha |g|}\, p(g)\, dg` is stationary at

    .. math:: e^{\alpha s}(255 + \alpha s) = 254\,e^{\alpha} + e^{\alpha\epsilon} -
              \tfrac{a}{b}\,(e^{\alpha\epsilon} - 1)

    Args:
        core: ``ε``, in units of max|g|.
        mass: the fraction of values inside the core, :math:`2 a \epsilon`.
        alpha: ``α``, per max|g|.

    Returns:
        s in units of max|g|; NaN where the stationary point lies inside the core, where the equation does not hold.

    >>> core, mass = torch.tensor([0.02]), torch.tensor([0.98])
    >>> [round(exact_clip(core, mass, alpha).item(), 4) for alpha in (0.5, 1.0, 4.0, 20.0)]
    [0.8751, 0.9212, 0.9915, 0.996]
    """
    core, mass = core.double(), mass.double()
    a, b = mass / (2 * core), (1.0 - mass) / (2 * (1.0 - core))
    inner = (-alpha * (1.0 - core)).exp()  # everything is divided by e^alpha, which may overflow
    right = 254.0 + inner - (a / b) * (inner - torch.exp(torch.full_like(core, -alpha)))

    def excess(s: torch.Tensor) -> torch.Tensor:
        return (alpha * (s - 1.0)).exp() * (255.0 + alpha * s) - right

    valid = (core > 0) & (core < 1) & (b > 0) & (excess(core) < 0) & torch.isfinite(right)
    low, high = core.clone(), torch.ones_like(core)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        below = excess(middle) < 0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.where(valid, (low + high) / 2, float("nan")).float()


@dataclass(frozen=True, kw_only=True)
class MagnitudeClip(RangeRule):
    r"""Magnitude-aware clipping (MCS): the clip value s of each channel by the shape of its distribution.

    A channel with :math:`P(|g| > \sigma) > \lambda` is Gaussian and takes :math:`s = \max|g|`; any other is an inverted
    T, many small values and few large ones, and takes

    .. math:: s_t = (1 - k A)\,s_{t-1} + A\,\max|g|_t

    from :math:`s_0 = \max|g|_0`; :math:`s_{t-1}` is the value used last, whatever the class was then. A channel of
    zeros gives zeros and keeps its s.

    Args:
        threshold: ``λ``.
        k, a: ``k`` and ``A``; 1 and 0.8 in the paper, an average that follows the new maximum by four fifths.
        rule: for inverted-T channels, ``"ema"`` as above, or ``"exact"``: the stationary point of the paper's error for
            the density it assumes, with the core at one standard deviation (our choice); where the equation does not
            hold, the average.
        alpha: ``α`` of the error's weight :math:`e^{\alpha|g|/\max|g|}` in ``"exact"``; the paper's value is
            unconfirmed, 1 is our default.
        update_interval: steps between two updates of s; 1 by default (unconfirmed).

    References:
        Zhao et al., Distribution Adaptive INT8 Quantization for Training CNNs, AAAI 2021, arXiv:2102.04782.
    """

    threshold: float = 0.3
    k: float = 1.0
    a: float = 0.8
    rule: str = "ema"
    alpha: float = 1.0
    update_interval: int = 1

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_number(self.threshold, f"{name}.threshold", 0.0, 1.0)
        check_number(self.k, f"{name}.k", 0.0, open_low=True)
        check_number(self.a, f"{name}.a", 0.0, open_low=True)
        check_number(self.k * self.a, f"{name}.k * a", 0.0, 2.0, open_low=True, open_high=True)  # else it diverges
        check_choice(self.rule, f"{name}.rule", ("ema", "exact"))
        check_number(self.alpha, f"{name}.alpha", 0.0, open_low=True)
        check_integer(self.update_interval, f"{name}.update_interval", 1)

    @property
    def can_clip(self) -> bool:
        return True

    def init_state(self, groups: int) -> State:
        return {"clip": torch.full((groups,), float("nan")), "age": torch.zeros(1, dtype=torch.int64)}

    def is_gaussian(self, statistics: ChannelStatistics) -> torch.Tensor:
        """Return which channels the classifier calls Gaussian."""
        return statistics.outside > self.threshold

    def limits(self, x: torch.Tensor, grain: Grain, state: State, update: bool) -> tuple[torch.Tensor, torch.Tensor]:
        known, shape = state["clip"], grain.scale_shape(x.shape)
        # an update is due for the first batch, then at every interval; a channel without a clip starts in between
        due = bool(state["age"] % self.update_interval == 0)
        if due or not bool(torch.isfinite(known).all()):
            statistics = channel_statistics(x, grain)
            largest = statistics.largest
            wanted = self._clip(statistics, known)
            fresh = wanted if due else torch.where(torch.isfinite(known), known, wanted)
        else:
            low, high = min_max(x, grain)
            largest = torch.maximum(-low, high).flatten()
            fresh = known
        finite, zero = torch.isfinite(largest), largest == 0
        clip = torch.where(finite & ~zero, fresh, known)
        if update and x.numel() and bool(finite.all()):  # else the whole step teaches nothing, other channels included
            state["clip"].copy_(clip)
            state["age"] += 1
        used = torch.where(zero, largest, torch.where(torch.isfinite(clip), clip, largest))
        used = torch.where(finite, used, float("nan")).reshape(shape)
        return -used, used

    def _clip(self, statistics: ChannelStatistics, known: torch.Tensor) -> torch.Tensor:
        """Return the clip value that each channel should have now."""
        largest = statistics.largest
        started = torch.isfinite(known)
        average = torch.where(started, (1.0 - self.k * self.a) * known + self.a * largest, largest)
        # a rule with k > 1 / A may cross zero when the gradient collapses
        clip = torch.where(average > 0, average, largest)
        if self.rule == "exact":
            core = statistics.sigma / largest.clamp(min=torch.finfo(torch.float32).tiny)
            exact = exact_clip(core, 1.0 - statistics.outside, self.alpha) * largest
            clip = torch.where(torch.isfinite(exact), exact, clip)
        return torch.where(self.is_gaussian(statistics), largest, clip)
