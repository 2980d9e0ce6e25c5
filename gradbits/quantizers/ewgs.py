"""Element-wise gradient scaling: the straight-through gradient, larger or smaller by the error of the rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from gradbits.core.checks import check_integer, check_number
from gradbits.core.errors import ArgumentError
from gradbits.core.grain import Grain
from gradbits.quantizers.estimators import STE, in_graph
from gradbits.quantizers.grids import Grid
from gradbits.quantizers.interval import UnitInterval, finite_or_zero, open_interval
from gradbits.quantizers.ranges import State


def scale_gradient(
    grad: torch.Tensor,
    normalised: torch.Tensor,
    discretized: torch.Tensor,
    delta: torch.Tensor | float,
    out: torch.Tensor | None = None,
    spare: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Return :math:`g_{x_n} = g_{x_q}\,(1 + \delta\,\mathrm{sign}(g_{x_q})\,(x_n - x_q))`, element by element.

    Args:
        grad: ``g``, by the discretized values.
        normalised, discretized: ``x_n`` and ``x_q``.
        delta: ``δ``.
        out: receives the result; may be ``discretized``.
        spare: memory like ``grad`` to work in.

    >>> x, q = torch.tensor([0.4, 0.4]), torch.tensor([1 / 3, 1 / 3])
    >>> [round(g, 4) for g in scale_gradient(torch.tensor([2.0, -2.0]), x, q, 0.5).tolist()]
    [2.0667, -1.9333]
    """
    error = torch.sub(normalised, discretized, out=out)
    return error.mul_(torch.sign(grad, out=spare)).mul_(delta).add_(1.0).mul_(grad)


def discretize(x: torch.Tensor, levels: int, delta: float = 0.0) -> torch.Tensor:
    r"""Return :math:`x_q = \mathrm{round}((n-1)\,x_n)/(n-1)` of normalised values, with the gradient of EWGS.

    Args:
        x: values in [0, 1], of any shape.
        levels: ``n``, at least 2.
        delta: ``δ``; 0 is the straight-through estimator.

    Raises:
        ArgumentError: fewer than 2 levels, a negative or infinite delta, or values outside [0, 1].

    References:
        Lee, Kim, Ham, Network Quantization with Element-wise Gradient Scaling, CVPR 2021, arXiv:2104.00903.

    >>> x = torch.tensor([0.9, 0.9], requires_grad=True)
    >>> y = discretize(x, 2, delta=1.0)
    >>> y.backward(torch.tensor([1.0, -1.0])); y.tolist(), [round(g, 4) for g in x.grad.tolist()]
    ([1.0, 1.0], [0.9, -1.1])
    """
    check_integer(levels, "levels", 2)
    check_number(delta, "delta", 0.0)
    if x.numel() and not bool(((x >= 0) & (x <= 1)).all()):
        raise ArgumentError("x: must be in [0, 1]; normalise and clip it before")
    out: torch.Tensor = _Discretize.apply(x, levels, delta)
    return out


class _Discretize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, levels: int, delta: float) -> torch.Tensor:
        out = torch.round(x * (levels - 1)) / (levels - 1)
        ctx.save_for_backward(x, out)
        ctx.delta = delta
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, out = ctx.saved_tensors
        return scale_gradient(grads[0], x, out, ctx.delta), None, None


@dataclass(frozen=True, kw_only=True)
class EWGS(STE):
    r"""Element-wise gradient scaling through the discretizer, ordinary derivatives through the learned interval.

    .. math:: \frac{\partial L}{\partial x} = \frac{g_{x_n}}{u - l}\,1[l \le x \le u], \qquad
              \frac{\partial L}{\partial u} = -\sum \frac{g_{x_n}}{u-l}\,\frac{x-l}{u-l}, \qquad
              \frac{\partial L}{\partial l} = \sum \frac{g_{x_n}}{u-l}\Big(\frac{x-l}{u-l} - 1\Big)

    with both sums over values inside the interval. The delta that scales g is part of the interval's state.

    Args:
        clip: whether values outside the interval get no gradient.
        normalise: whether the gradients of what is learned are divided by :math:`\sqrt{N (n-1)}`, N values in the
            tensor, as learned step sizes do. A sum over a large tensor dwarfs the gradient of any one weight: an
            optimizer that does not adapt to that (SGD) needs it, Adam does not. Not in the paper.

    References:
        Lee, Kim, Ham, CVPR 2021, arXiv:2104.00903; Esser et al., ICLR 2020, arXiv:1902.08153, for the normalisation.
    """

    clip: bool = True
    normalise: bool = True

    @property
    def learns(self) -> bool:
        return True

    def backward(
        self, x: torch.Tensor, grad: torch.Tensor, grid: Grid, grain: Grain, state: State
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert isinstance(grid, UnitInterval)
        shape = grain.scale_shape(x.shape)
        low, high = open_interval(*(state[name].detach().float().reshape(shape) for name in ("low", "high")))
        width, steps, grad = high - low, grid.steps, grad.float()
        delta = float(state["delta"])
        # memory is reused below: fresh pages cost more than the arithmetic
        place = (x.detach().float() - low).div_(width)
        normalised = place.clamp(0.0, 1.0)
        outside = place != normalised if self.clip else None
        learned: dict[str, torch.Tensor] = {}
        discretized = normalised.mul(steps).round_().div_(steps)
        if "output_scale" in state:
            factor = state["output_scale"].detach().float().reshape(())
            learned["output_scale"] = (grad * (2.0 * discretized - 1.0)).sum() * torch.sign(factor)
            grad = grad * (2.0 * factor.abs())
        elif grid.signed:
            grad = 2.0 * grad
        if delta:
            spare = torch.empty_like(place) if outside is None else place  # without clipping it is needed below
            grad = scale_gradient(grad, normalised, discretized, delta, out=discretized, spare=spare)
        grad = torch.div(grad, width, out=discretized)
        if outside is not None:
            grad.masked_fill_(outside, 0.0)
            place = normalised
        # sums over groups of g (x_n - 1) and -g x_n
        total, moment = (grain.split(t).sum(-1) for t in (grad, place.mul_(grad)))
        learned["low"], learned["high"] = moment - total, -moment
        divisor = math.sqrt(max(x.numel(), 1) * steps) if self.normalise else 1.0
        found = {
            name: finite_or_zero(value.reshape(state[name].shape) / divisor).to(state[name].dtype)
            for name, value in learned.items()
        }
        return grad, found

    def twice(
        self,
        x: torch.Tensor,
        values: torch.Tensor,
        ends: tuple[torch.Tensor, torch.Tensor],
        grid: Grid,
        state: State,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(grid, UnitInterval)
        low, high = ends
        normalised = ((x.float() - low) / (high - low)).clamp(0.0, 1.0)
        rounded = torch.round(normalised.detach() * grid.steps) / grid.steps
        discretized = in_graph(normalised + (rounded - normalised).detach())
        mapped = 2.0 * discretized - 1.0 if grid.signed else discretized
        if "output_scale" in state:
            mapped = mapped * state["output_scale"].float().abs()
        return discretized, mapped
