"""Estimators: how a gradient passes back through a quantizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gradbits.core.grain import Grain
from gradbits.core.spec import Spec
from gradbits.quantizers.grids import Grid


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

    def mask(self, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor | None:
        """Return where the gradient passes, or None where it passes everywhere."""
        return (x >= low) & (x <= high) if self.clip else None

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


def in_graph(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` as a node of a graph, a new leaf where nothing before it needs a gradient."""
    return x if x.requires_grad else x.detach().requires_grad_()


class StraightThrough(torch.autograd.Function):
    """Replaces values by given ones; the gradient passes where ``mask`` is true, or everywhere if it is None."""

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
