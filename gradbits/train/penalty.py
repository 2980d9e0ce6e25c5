"""Gradient L1 regularization during a reference run: when it begins and how strong it is."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import torch
from torch import nn

from gradbits.optim.gradient_l1 import Recorded, gradient_l1, record_activations
from gradbits.train.options import TrainOptions


@dataclass(frozen=True, kw_only=True)
class GradientPenalty:
    """The term of ``gradbits.gradient_l1`` as a run asks for it.

    Args:
        weight, activation: the coefficients.
        start: steps without a term.
        warmup: further steps over which it grows.
    """

    weight: float
    activation: float
    start: int = 0
    warmup: int = 0

    def is_on(self, step: int) -> bool:
        """Whether a step has a term."""
        return step > self.start and (self.weight > 0 or self.activation > 0)

    def recording(self, model: nn.Module, step: int) -> contextlib.AbstractContextManager[Recorded]:
        """Return the context of the forward pass of a step."""
        if self.activation > 0 and self.is_on(step):
            return record_activations(model)
        return contextlib.nullcontext([])

    def term(self, loss: torch.Tensor, model: nn.Module, recorded: Recorded, step: int) -> torch.Tensor:
        """Return the term of a step."""
        return gradient_l1(
            loss,
            model,
            weight=self.weight,
            activation=self.activation,
            recorded=recorded,
            step=step,
            start=self.start,
            warmup=self.warmup,
        )

    def at_once(self) -> GradientPenalty:
        """Return the penalty without a schedule, for measuring what a step costs with it."""
        return replace(self, start=0, warmup=0)


def make_penalty(options: TrainOptions, steps_per_epoch: int, total_steps: int) -> GradientPenalty | None:
    """Return the penalty that the options ask for: it grows over an epoch, or half of what is left of the run."""
    if options.gradient_l1 is None:
        return None
    start = int((options.gradient_l1_start or 0.0) * total_steps)
    activation = options.gradient_l1_activations
    return GradientPenalty(
        weight=options.gradient_l1,
        activation=options.gradient_l1 if activation is None else activation,
        start=start,
        warmup=min(steps_per_epoch, (total_steps - start) // 2),
    )
