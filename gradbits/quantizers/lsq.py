"""Learned step size quantization: the step of the grid is a parameter with a gradient of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from gradbits.core.grain import Grain
from gradbits.core.ranks import mean_over_ranks
from gradbits.quantizers.estimators import STE
from gradbits.quantizers.grids import Grid
from gradbits.quantizers.ranges import RangeRule, State, min_max


def initial_step(x: torch.Tensor, highest: int, grain: Grain) -> torch.Tensor:
    r"""Return the step that a first batch suggests, :math:`s = 2\,\overline{|x|}/\sqrt{Q_p}`, in the scale shape.

    Args:
        x: values.
        highest: ``Q_p``, the highest code.
        grain: what shares one step.

    >>> from gradbits.core.grain import PerTensor
    >>> initial_step(torch.tensor([1.0, -3.0]), 4, PerTensor()).item()
    2.0
    """
    groups = grain.split(x.detach().abs().float())
    return (groups.mean(dim=-1) * (2.0 / math.sqrt(highest))).reshape(grain.scale_shape(x.shape))


def step_gradient(
    x: torch.Tensor, step: torch.Tensor, grad: torch.Tensor, levels: tuple[int, int], grain: Grain
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Return the gradients of values and steps for the gradient of the quantized values.

    .. math:: \frac{\partial L}{\partial s} = \frac{1}{\sqrt{n\,Q_p}} \sum \frac{\partial L}{\partial \hat x}
              \begin{cases} Q_n & v < Q_n \\ Q_p & v > Q_p \\ \mathrm{round}(v) - v & \text{otherwise} \end{cases},
              \qquad v = x/s

    and :math:`\partial L/\partial x = \partial L/\partial\hat x` where :math:`Q_n \le v \le Q_p`, else 0; n is the
    number of values in the whole tensor.

    Args:
        x: values before the grid.
        step: ``s``, positive, broadcastable to ``x``.
        grad: gradient of the quantized values, in the shape of ``x``.
        levels: ``Q_n`` and ``Q_p``.
        grain: what shares one step.

    >>> from gradbits.core.grain import PerTensor
    >>> x, s = torch.tensor([0.25, 9.0]), torch.tensor([1.0])
    >>> grad_x, grad_step = step_gradient(x, s, torch.ones(2), (-8, 7), PerTensor())
    >>> grad_x.tolist(), round(grad_step.item(), 4)  # (-0.25 + 7) / sqrt(2 * 7)
    ([1.0, 0.0], 1.804)
    """
    lowest, highest = levels
    v = x.float() / step
    grad = grad.float()
    outside = v.clamp(lowest, highest) != v
    # the clamped code is Q_n or Q_p outside; inside, v is taken off it
    slope = torch.round(v).clamp_(lowest, highest).sub_(v.masked_fill_(outside, 0.0)).mul_(grad)
    total = grain.split(slope).sum(dim=-1).reshape(grain.scale_shape(x.shape))
    return grad.masked_fill(outside, 0.0), total / math.sqrt(max(x.numel(), 1) * highest)


@dataclass(frozen=True, kw_only=True)
class MeanStep(RangeRule):
    r"""A step from each batch, :math:`s = 2\,\overline{|x|}/\sqrt{Q_p}`: where learned steps start, not learned."""

    @property
    def can_clip(self) -> bool:
        return True

    def limits_on(
        self, grid: Grid, x: torch.Tensor, grain: Grain, state: State, update: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lowest, highest = grid.levels
        step = initial_step(x, highest, grain) if x.numel() else x.new_zeros(grain.scale_shape(x.shape)).float()
        return lowest * step, highest * step


@dataclass(frozen=True, kw_only=True)
class LearnedStep(RangeRule):
    r"""A step that training learns, started by the first batch: the range is :math:`[Q_n |s|,\, Q_p |s|]`.

    The step is a parameter of the layer. A batch that is not finite, or all zeros, does not start it; a checkpoint
    brings the step and the fact that it has been started.

    References:
        Esser et al., Learned Step Size Quantization, ICLR 2020, arXiv:1902.08153; as used in Xi et al., NeurIPS 2023,
        arXiv:2306.11987.
    """

    learned: ClassVar[tuple[str, ...]] = ("step",)

    @property
    def can_clip(self) -> bool:
        return True

    def init_state(self, groups: int) -> State:
        return {"step": torch.ones(groups), "started": torch.zeros(1, dtype=torch.int64)}

    def limits_on(
        self, grid: Grid, x: torch.Tensor, grain: Grain, state: State, update: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lowest, highest = grid.levels
        shape = grain.scale_shape(x.shape)
        low, high = min_max(x, grain)
        finite = torch.isfinite(low) & torch.isfinite(high)
        step = state["step"].detach().abs().reshape(shape)
        if not bool(state["started"]):
            if x.numel():
                step = initial_step(x, highest, grain)
            ready = bool((finite & (step > 0)).all()) and x.numel() > 0
            if update:  # replicas must start from one step: it starts once every rank has a usable batch
                mine = torch.cat([torch.where(finite, step, 0.0).reshape(-1), step.new_full((1,), float(ready))])
                shared = mean_over_ranks(mine)
                if float(shared[-1]) == 1.0:
                    step = shared[:-1].reshape(shape)
                    state["step"].detach().copy_(shared[:-1])
                    state["started"].fill_(1)
        step = torch.where(finite, step, float("nan"))
        return lowest * step, highest * step


@dataclass(frozen=True, kw_only=True)
class LSQ(STE):
    """The straight-through estimator inside the range, and a gradient for the step."""

    clip: bool = True

    @property
    def learns(self) -> bool:
        return True

    def backward(
        self, x: torch.Tensor, grad: torch.Tensor, grid: Grid, grain: Grain, state: State
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        step = state["step"].detach()
        shape = grain.scale_shape(x.shape)
        size = step.abs().clamp(min=torch.finfo(torch.float32).tiny).reshape(shape)
        grad_x, grad_step = step_gradient(x, size, grad, grid.levels, grain)
        grad_step = grad_step.reshape(-1) * torch.where(step < 0, -1.0, 1.0)
        # one bad batch must not reach what the layer has learned, not even by way of other channels
        grad_step = torch.where(torch.isfinite(grad_step).all(), grad_step, 0.0)
        return grad_x, {"step": grad_step.to(step.dtype)}


class LearnedStepQuantize(torch.autograd.Function):
    """Fake quantization with a learned step; see ``learned_step_quantize``."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, step: torch.Tensor, levels: tuple[int, int], grain: Grain
    ) -> torch.Tensor:
        """Return the quantized values."""
        ctx.save_for_backward(x, step)
        ctx.levels, ctx.grain = levels, grain
        return (torch.round(x / step.abs()).clamp(*levels) * step.abs()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        """Return the gradients of values and steps."""
        x, step = ctx.saved_tensors
        grad_x, grad_step = step_gradient(x, step.abs(), grads[0], ctx.levels, ctx.grain)
        return grad_x.to(x.dtype), (grad_step.reshape(step.shape) * torch.sign(step)).to(step.dtype), None, None


def learned_step_quantize(
    x: torch.Tensor, step: torch.Tensor, levels: tuple[int, int], grain: Grain
) -> torch.Tensor:
    r"""Return :math:`\hat x = s\,\mathrm{clamp}(\mathrm{round}(x/s), Q_n, Q_p)` with the gradients of LSQ.

    Args:
        x: values.
        step: ``s``, broadcastable to ``x``.
        levels: ``Q_n`` and ``Q_p``.
        grain: what shares one step.

    References:
        Esser et al., ICLR 2020, arXiv:1902.08153.

    >>> from gradbits.core.grain import PerTensor
    >>> learned_step_quantize(torch.tensor([0.6, 9.0]), torch.tensor([1.0]), (-8, 7), PerTensor()).tolist()
    [1.0, 7.0]
    """
    out: torch.Tensor = LearnedStepQuantize.apply(x, step, levels, grain)
    return out
