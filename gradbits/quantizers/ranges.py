"""Range rules: which interval of values the codes cover."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from gradbits.core.checks import check_number
from gradbits.core.grain import Grain, PerBlock, PerChannel, PerTensor
from gradbits.core.spec import Spec
from gradbits.kernels.dispatch import Request, run
from gradbits.quantizers.grids import Grid, GridValues
from gradbits.quantizers.known import known_width

State = dict[str, torch.Tensor]


def min_max(x: torch.Tensor, grain: Grain) -> tuple[torch.Tensor, torch.Tensor]:
    """Return minimum and maximum of what shares one scale, in float32 and the grain's scale shape; 0 where empty.

    >>> from gradbits.core.grain import PerRow
    >>> low, high = min_max(torch.tensor([[1.0, -2.0], [3.0, 4.0]]), PerRow())
    >>> low.flatten().tolist(), high.flatten().tolist()
    ([-2.0, 3.0], [1.0, 4.0])
    """
    shape = grain.scale_shape(x.shape)
    if x.numel() == 0:
        return torch.zeros(shape, device=x.device), torch.zeros(shape, device=x.device)
    axis = None
    if isinstance(grain, PerBlock):
        x, axis = grain.split(x), 0
    elif isinstance(grain, PerChannel):
        axis = grain.axis % x.dim()
    low, high = run("min_max", Request(x.device.type), "auto", x, axis)
    return low.reshape(shape), high.reshape(shape)


@dataclass(frozen=True, kw_only=True)
class RangeRule(Spec):
    """How the range of a quantizer is chosen; the base of all rules."""

    learned: ClassVar[tuple[str, ...]] = ()  # entries of the state that are parameters of the layer
    by_magnitude: ClassVar[bool] = False  # whether it is symmetric and asks for ``largest_magnitude`` of the values

    @property
    def can_clip(self) -> bool:
        """Whether values may lie outside the range."""
        return False

    def init_state(self, groups: int) -> State:
        """Return the initial state for ``groups`` scales; empty for a rule that remembers nothing."""
        return {}

    def limits(self, x: torch.Tensor, grain: Grain, state: State, update: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the range (low, high) for ``x`` in the grain's scale shape; NaN where ``x`` is not finite.

        Args:
            x: values.
            grain: what shares one scale.
            state: from ``init_state``; changed in place, and only by finite values.
            update: whether this call may change the state.
        """
        raise NotImplementedError

    def limits_on(
        self, grid: Grid, x: torch.Tensor, grain: Grain, state: State, update: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``limits`` for a rule that sets the range by the grid's steps; the others ignore ``grid``."""
        return self.limits(x, grain, state, update)

    def width(self, grid: Grid, x: torch.Tensor, state: State, update: bool) -> torch.Tensor | None:
        """Return one number, c of the range [-c, c] that all of ``x`` shares, for a rule by magnitude.

        None means the largest magnitude, which is not known.
        """
        raise NotImplementedError

    def rescale(self, placed: GridValues, state: State) -> GridValues:
        """Return what the codes of ``placed`` stand for, for a rule that learns a factor of the values besides."""
        return placed

    def wants_output(self, state: State) -> bool:
        """Whether a weight's rule has yet to be started by the layer's output, with ``match_output``."""
        return False

    def match_output(self, state: State, wanted: torch.Tensor, found: torch.Tensor, update: bool) -> None:
        """Start what depends on the output in float, ``wanted``, and by the codes as they are, ``found``.

        Args:
            state: of the weight's quantizer; changed in place.
            wanted, found: the layer's output, with the bias only where ``scales_bias``.
            update: whether the start is final, not for one evaluation.
        """
        raise NotImplementedError

    @property
    def scales_bias(self) -> bool:
        """Whether a factor that a weight's rule learns applies to the bias too, by ``scaled_bias``."""
        return False

    def scaled_bias(self, bias: torch.Tensor, state: State) -> torch.Tensor:
        """Return the bias times the factor that the rule learns; differentiable."""
        raise NotImplementedError


def largest_magnitude(x: torch.Tensor, grain: Grain) -> torch.Tensor:
    """Return the largest magnitude of what shares one scale, in the grain's scale shape, noted or looked for.

    >>> from gradbits.core.grain import PerTensor
    >>> largest_magnitude(torch.tensor([1.0, -2.0]), PerTensor()).tolist()
    [2.0]
    """
    known = known_width(x) if isinstance(grain, PerTensor) else None
    if known is not None:
        return known.reshape(grain.scale_shape(x.shape))
    low, high = min_max(x, grain)
    return torch.maximum(-low, high)


@dataclass(frozen=True, kw_only=True)
class AbsMax(RangeRule):
    r"""The symmetric range :math:`[-c, c],\ c = \max|x|`.

    >>> from gradbits.core.grain import PerTensor
    >>> [t.item() for t in AbsMax().limits(torch.tensor([1.0, -3.0]), PerTensor(), {}, True)]
    [-3.0, 3.0]
    """

    by_magnitude = True

    def limits(self, x: torch.Tensor, grain: Grain, state: State, update: bool) -> tuple[torch.Tensor, torch.Tensor]:
        largest = largest_magnitude(x, grain)
        return -largest, largest

    def width(self, grid: Grid, x: torch.Tensor, state: State, update: bool) -> torch.Tensor | None:
        return known_width(x)


@dataclass(frozen=True, kw_only=True)
class MinMax(RangeRule):
    r"""The range :math:`[\min x, \max x]`."""

    def limits(self, x: torch.Tensor, grain: Grain, state: State, update: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return min_max(x, grain)


@dataclass(frozen=True, kw_only=True)
class EMA(RangeRule):
    r"""An exponential moving average of another rule's range, started by the first batch.

    .. math:: a \leftarrow a + (1-d)\,(\min_\text{batch} - a), \qquad b \leftarrow b + (1-d)\,(\max_\text{batch} - b)

    Args:
        decay: ``d``, in [0, 1).
        of: the rule that looks at one batch.

    References:
        Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
        CVPR 2018, arXiv:1712.05877. The paper asks for a decay close to 1 without naming one; 0.99 is our default.
    """

    decay: float = 0.99
    of: RangeRule = AbsMax()

    def __post_init__(self) -> None:
        check_number(self.decay, "EMA.decay", 0.0, 1.0, open_high=True)

    @property
    def can_clip(self) -> bool:
        return True

    def init_state(self, groups: int) -> State:
        return {"low": torch.full((groups,), float("nan")), "high": torch.full((groups,), float("nan"))}

    def limits(self, x: torch.Tensor, grain: Grain, state: State, update: bool) -> tuple[torch.Tensor, torch.Tensor]:
        seen = torch.stack([t.reshape(-1) for t in self.of.limits(x, grain, {}, False)])
        known = torch.stack([state["low"], state["high"]])
        finite = torch.isfinite(seen).all(dim=0)
        started = torch.isfinite(known).all(dim=0)
        if update and x.numel() and bool(finite.all()):  # else the whole step teaches nothing, other channels included
            moved = known + (1.0 - self.decay) * (seen - known)
            known = torch.where(started, moved, seen)
            state["low"].copy_(known[0])
            state["high"].copy_(known[1])
            started = torch.isfinite(known).all(dim=0)
        used = torch.where(started, known, seen)
        used = torch.where(finite, used, torch.full_like(used, float("nan")))
        shape = grain.scale_shape(x.shape)
        return used[0].reshape(shape), used[1].reshape(shape)
