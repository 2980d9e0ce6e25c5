"""Learned intervals: the grid on a normalised interval, and the rules by which its ends start and are learned."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from gradbits.core.checks import check_instance, check_number
from gradbits.core.grain import Grain
from gradbits.core.ranks import mean_over_ranks
from gradbits.kernels.quantize import TINY, CodeMap
from gradbits.quantizers.grids import Grid, GridValues
from gradbits.quantizers.ranges import RangeRule, State, min_max

NARROWEST = 1e-6  # least width of an interval, relative to its ends
HALF_NORMAL_STD = math.sqrt(1.0 - 2.0 / math.pi)


@dataclass(frozen=True, kw_only=True)
class UnitInterval(Grid):
    r"""All :math:`n = 2^b` levels of a normalised interval.

    .. math:: x_n = \mathrm{clip}\Big(\frac{x - l}{u - l}, 0, 1\Big), \qquad
              x_q = \frac{\mathrm{round}((n-1)\,x_n)}{n-1}, \qquad
              \hat x = x_q \ \text{or, signed,}\ 2 x_q - 1

    The values are in [0, 1] or [-1, 1] wherever the interval lies: the method learns a factor of the output besides.
    With 1 bit they are {0, 1} or {-1, 1}.

    Args:
        bits: bits of one code, 1 to 8.
        signed: whether the levels are spread over [-1, 1].

    >>> grid = UnitInterval(bits=1, signed=True).place(torch.tensor([0.0]), torch.tensor([3.0]))
    >>> [(grid.scale * code + grid.offset).item() for code in (grid.code_map.low, grid.code_map.high)]
    [-1.0, 1.0]
    """

    least_bits: ClassVar[int] = 1
    signed: bool = False

    @property
    def steps(self) -> int:
        """Steps between the ends, n - 1."""
        return (1 << self.bits) - 1

    def place(self, low: torch.Tensor, high: torch.Tensor) -> GridValues:
        half = 1 << (self.bits - 1)
        width = high - low
        inverse = torch.nan_to_num(self.steps / width, nan=0.0, posinf=0.0, neginf=0.0)
        lowest = torch.full_like(low, float(-half))
        code_map = CodeMap(inverse, -half, half - 1, shift=low, zero=lowest)
        scale = torch.full_like(low, (2.0 if self.signed else 1.0) / self.steps) + (
            width - width
        )  # NaN where not finite
        if self.signed:  # code 0 lies half a step above the middle
            return GridValues(code_map=code_map, scale=scale, offset=0.5 * scale)
        return GridValues(code_map=code_map, scale=scale, zero_point=lowest)


def open_interval(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the interval with its upper end moved out where it is empty, turned round or too narrow to divide by.

    >>> low, high = open_interval(torch.tensor([1.0]), torch.tensor([0.5])); bool(low < high)
    True
    """
    least = NARROWEST * torch.maximum(low.abs(), high.abs()).clamp(min=256 * TINY / NARROWEST)
    return low, torch.maximum(high, low + least)


@dataclass(frozen=True, kw_only=True)
class LearnedInterval(RangeRule):
    """An interval [l, u] whose ends are parameters, started by the first usable batch; the base of the two below.

    A batch that is empty, not finite or of equal values does not start it. A checkpoint brings the ends, the scaling
    factor delta of the gradient, and the fact that they have been started.

    Args:
        delta: what ``EWGS`` scales gradients with until it is measured.
    """

    learned: ClassVar[tuple[str, ...]] = ("low", "high")
    delta: float = 0.0

    def __post_init__(self) -> None:
        check_number(self.delta, f"{type(self).__name__}.delta", 0.0)

    @property
    def can_clip(self) -> bool:
        return True

    def initial(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ends for values [..., elements] in float64, reduced over the last axis."""
        raise NotImplementedError

    def init_state(self, groups: int) -> State:
        return {
            "low": torch.zeros(groups),
            "high": torch.ones(groups),
            "delta": torch.full((1,), self.delta),
            "started": torch.zeros(1, dtype=torch.int64),
        }

    def limits_on(
        self, grid: Grid, x: torch.Tensor, grain: Grain, state: State, update: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape = grain.scale_shape(x.shape)
        least, largest = min_max(x, grain)
        finite = torch.isfinite(least) & torch.isfinite(largest)
        low, high = (state[name].detach().float().reshape(shape) for name in ("low", "high"))
        if not bool(state["started"]):
            low, high = self._start(x, grain, (least, largest), state, update)
        low, high = open_interval(low, high)
        nan = float("nan")
        return torch.where(finite, low, nan), torch.where(finite, high, nan)

    def _start(
        self, x: torch.Tensor, grain: Grain, extremes: tuple[torch.Tensor, torch.Tensor], state: State, update: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the interval that a batch suggests and, where it is usable and may, start the state with it."""
        least, largest = extremes
        ready = x.numel() > 0 and bool((torch.isfinite(least) & torch.isfinite(largest) & (least < largest)).all())
        low, high = least.clamp(max=0.0), largest.clamp(min=0.0)
        if ready:
            low, high = (end.float().reshape(low.shape) for end in self.initial(grain.split(x.detach()).double()))
        if update:  # replicas must start alike: once every rank has a usable batch
            mine = torch.cat([torch.nan_to_num(low).reshape(-1), torch.nan_to_num(high).reshape(-1)])
            shared = mean_over_ranks(torch.cat([mine, mine.new_full((1,), float(ready))]))
            if float(shared[-1]) == 1.0:
                low, high = (end.reshape(low.shape) for end in shared[:-1].chunk(2))
                state["low"].detach().copy_(low.reshape(-1))
                state["high"].detach().copy_(high.reshape(-1))
                state["started"].fill_(1)
        return low, high


@dataclass(frozen=True, kw_only=True)
class ActivationInterval(LearnedInterval):
    r"""A learned interval that starts as :math:`l = \min x,\ u = 3\,\mathrm{std}(x)/\sqrt{1 - 2/\pi}`.

    The root is the standard deviation of a half-normal distribution of unit scale: that of a ReLU's outputs. Values far
    from zero, for which this u lies below l, start at u = max x.
    """

    def initial(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = groups.amin(-1), 3.0 / HALF_NORMAL_STD * groups.std(-1)
        return low, torch.where(high > low, high, groups.amax(-1))


@dataclass(frozen=True, kw_only=True)
class WeightInterval(LearnedInterval):
    r"""A learned interval that starts as :math:`\mp 3\,\mathrm{std}(w)`, and a learned factor of the layer's output.

    .. math:: y = |\alpha|\,(\bar a * \bar w) + b, \qquad
              \alpha = \overline{|a * w|} / \overline{|\bar a * \bar w|} \ \text{at the start}

    The factor belongs to the values of the codes, so it costs nothing in the product.

    Args:
        delta: as for ``LearnedInterval``.
        bias_inside: whether the factor applies to the bias too, :math:`|\alpha|(\bar a * \bar w + b)`, as in the
            official code, whose networks have no such biases. A bias that was trained in float then changes its size.
    """

    learned: ClassVar[tuple[str, ...]] = ("low", "high", "output_scale")
    bias_inside: bool = False

    def __post_init__(self) -> None:
        LearnedInterval.__post_init__(self)
        check_instance(self.bias_inside, "WeightInterval.bias_inside", bool)

    def initial(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        spread = 3.0 * groups.std(-1)
        return -spread, spread

    def init_state(self, groups: int) -> State:
        own = {"output_scale": torch.ones(1), "scaled": torch.zeros(1, dtype=torch.int64)}
        return {**LearnedInterval.init_state(self, groups), **own}

    def rescale(self, placed: GridValues, state: State) -> GridValues:
        factor = state["output_scale"].detach().float().abs().reshape(())
        assert placed.offset is not None  # the grid of weights is signed
        return replace(placed, scale=placed.scale * factor, offset=placed.offset * factor)

    def wants_output(self, state: State) -> bool:
        return not bool(state["scaled"])

    def match_output(self, state: State, wanted: torch.Tensor, found: torch.Tensor, update: bool) -> None:
        means = [y.detach().double().abs().mean() for y in (wanted, found)]
        ready = bool(torch.isfinite(means[0]) & torch.isfinite(means[1]) & (means[0] > 0) & (means[1] > 0))
        factor = (means[0] / means[1]).float() if ready else torch.ones((), device=wanted.device)
        if update:
            shared = mean_over_ranks(torch.stack([factor, factor.new_tensor(float(ready))]))
            if float(shared[1]) == 1.0 and bool(state["started"]):
                factor = shared[0]
                state["scaled"].fill_(1)
        state["output_scale"].detach().copy_(factor)

    @property
    def scales_bias(self) -> bool:
        return self.bias_inside

    def scaled_bias(self, bias: torch.Tensor, state: State) -> torch.Tensor:
        out: torch.Tensor = ScaledBias.apply(bias, state["output_scale"])
        return out


class ScaledBias(torch.autograd.Function):
    """``bias * |factor|``; a gradient that is not finite does not reach the factor."""

    @staticmethod
    def forward(ctx: Any, bias: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """Return the scaled bias in its own dtype."""
        ctx.save_for_backward(bias, factor)
        return (bias.float() * factor.float().abs()).to(bias.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of bias and factor."""
        bias, factor = ctx.saved_tensors
        grad = grads[0].float()
        own = ((grad * bias.float()).sum() * torch.sign(factor.float())).reshape(factor.shape)
        return (grad * factor.float().abs()).to(bias.dtype), finite_or_zero(own).to(factor.dtype)


def finite_or_zero(grad: torch.Tensor) -> torch.Tensor:
    """Return ``grad`` with zeros where it is not finite: one bad batch must not reach what a layer has learned."""
    return torch.where(torch.isfinite(grad), grad, 0.0)
