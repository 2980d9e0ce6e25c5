"""Estimators: how a gradient passes back through a quantizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gradbits.core.checks import check_instance, check_number
from gradbits.core.grain import Grain
from gradbits.core.spec import Spec
from gradbits.quantizers.grids import Grid

COLDEST = 1e-30  # least temperature: 1/T is finite in float32, so that 0/T is 0 and no gradient NaN


@dataclass(frozen=True, kw_only=True)
class STE(Spec):
    r"""The straight-through estimator.

    .. math:: \frac{\partial L}{\partial x} = \frac{\partial L}{\partial \hat{x}}
              \quad\text{or, clipped,}\quad \frac{\partial L}{\partial \hat{x}}\,1[l \le x \le h]

    Args:
        clip: whether values outside the range get no gradient; the ends of the range pass it.

    References:
        Bengio, Léonard, Courville, Estimating or Propagating Gradients Through Stochastic Neurons for Conditional
        Computation, 2013, arXiv:1308.3432.

    >>> STE(clip=True).mask(torch.tensor([-2.0, -1.0, 0.5]), torch.tensor(-1.0), torch.tensor(1.0)).tolist()
    [False, True, True]
    """

    clip: bool = False

    def __post_init__(self) -> None:
        check_instance(self.clip, f"{type(self).__name__}.clip", bool)

    def mask(self, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor | None:
        """Return where the gradient passes, or what it is multiplied with; None where it passes everywhere."""
        return (x >= low) & (x <= high) if self.clip else None

    @property
    def shapes(self) -> bool:
        """Whether the gradient depends on values inside the range too, so that it has a mask even where none clip."""
        return False

    @property
    def learns(self) -> bool:
        """Whether the range has parameters that get gradients; then ``backward`` takes the place of ``mask``."""
        return False

    def backward(
        self, x: torch.Tensor, grad: torch.Tensor, grid: Grid, grain: Grain, state: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the gradient of ``x`` and of the state's learned entries, for the gradient of the quantized values."""
        raise NotImplementedError

    def twice(
        self,
        x: torch.Tensor,
        values: torch.Tensor,
        ends: tuple[torch.Tensor, torch.Tensor],
        grid: Grid,
        state: dict[str, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the discretized tensor and the quantized values by operations that autograd differentiates twice.

        Args:
            x: values before the grid.
            values: after it.
            ends: of the range, broadcastable to ``x``.
            grid: the grid.
            state: of the range.
        """
        mask = self.mask(x.detach(), *ends)
        passed = x if mask is None else x * mask
        out = in_graph(passed + (values.to(x.dtype) - passed).detach())
        return out, out


@dataclass(frozen=True, kw_only=True)
class ClippedSTE(STE):
    r"""The straight-through estimator inside a fixed limit, :math:`g_a = g_h\,1[|a| \le c]`: the derivative of a clip.

    The gradient of units that have saturated is dropped, so that values before a sign do not drift away.

    Args:
        clip: whether values outside the quantizer's range get no gradient either.
        limit: c.
        ends: whether :math:`|a| = c` passes.

    References:
        Courbariaux et al., BinaryConnect, arXiv:1511.00363, and what follows it; not in arXiv:1308.3432.

    >>> ClippedSTE().mask(torch.tensor([-1.5, -1.0, 0.3]), torch.tensor(-9.0), torch.tensor(9.0)).tolist()
    [False, True, True]
    """

    limit: float = 1.0
    ends: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.limit, "ClippedSTE.limit", 0.0, open_low=True)
        check_instance(self.ends, "ClippedSTE.ends", bool)

    @property
    def shapes(self) -> bool:
        return True

    def mask(self, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor | None:
        inside = x.abs() <= self.limit if self.ends else x.abs() < self.limit
        return inside & (x >= low) & (x <= high) if self.clip else inside


@dataclass(frozen=True, kw_only=True)
class SigmoidSTE(STE):
    r"""The gradient times the derivative of a sigmoid, :math:`g_a = g_h\,\sigma(a/T)(1 - \sigma(a/T))/T`.

    Exact for a stochastic neuron of probability σ(a/T) whose output the loss depends on linearly.

    Args:
        clip: as for ``STE``.
        temperature: T, at least 1e-30.

    References:
        Bengio, Léonard, Courville, 2013, arXiv:1308.3432.

    >>> SigmoidSTE().mask(torch.zeros(1), torch.tensor(-1.0), torch.tensor(1.0)).tolist()
    [0.25]
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.temperature, "SigmoidSTE.temperature", COLDEST)

    @property
    def shapes(self) -> bool:
        return True

    def mask(self, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor | None:
        wide = x if x.dtype == torch.float64 else x.float()  # in half precision the product underflows
        p = torch.sigmoid(wide / self.temperature)
        slope = p * (1.0 - p) / self.temperature
        return slope * ((x >= low) & (x <= high)) if self.clip else slope


@dataclass(frozen=True, kw_only=True)
class HardSigmoidSTE(STE):
    r"""The gradient times the derivative of :math:`\mathrm{clip}((a/T+1)/2, 0, 1)`: 1/(2T) for |a| < T, else 0.

    Args:
        clip: as for ``STE``.
        temperature: T, at least 1e-30.

    References:
        Bengio, Léonard, Courville, 2013, arXiv:1308.3432; this slope and offset are those of binarized networks.

    >>> HardSigmoidSTE().mask(torch.tensor([-1.0, 0.5]), torch.tensor(-9.0), torch.tensor(9.0)).tolist()
    [0.0, 0.5]
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.temperature, "HardSigmoidSTE.temperature", COLDEST)

    @property
    def shapes(self) -> bool:
        return True

    def mask(self, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor | None:
        inside = x.abs() < self.temperature
        inside = inside & (x >= low) & (x <= high) if self.clip else inside
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return inside.to(wide) * (0.5 / self.temperature)


def in_graph(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` as a node of a graph, a new leaf where nothing before it needs a gradient."""
    return x if x.requires_grad else x.detach().requires_grad_()


class StraightThrough(torch.autograd.Function):
    """Replaces values by given ones; the gradient is multiplied by ``mask``, or passes everywhere if it is None."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Return ``values`` in the dtype of ``x``."""
        if mask is not None:
            ctx.save_for_backward(mask)
        return values.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Return the masked gradient."""
        (grad,) = grads
        saved = ctx.saved_tensors  # once: activation checkpointing unpacks a tensor no second time
        return (grad * saved[0] if saved else grad), None, None
