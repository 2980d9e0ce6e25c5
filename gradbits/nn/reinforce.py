"""Stochastic binary units whose gradient is estimated from the loss alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from gradbits.core.checks import check_float_tensor, check_integer, check_number
from gradbits.core.errors import ArgumentError, DtypeError
from gradbits.nn.stochastic import bernoulli, firing_probability


def reinforce_gradient(
    h: torch.Tensor, probability: torch.Tensor, losses: torch.Tensor, baseline: torch.Tensor | float = 0.0
) -> torch.Tensor:
    r"""Return the likelihood-ratio estimate :math:`g_a = (h - \sigma(a))\,(L - \bar L)`, unbiased for any constant L̄.

    Args:
        h: outputs 0 or 1, [examples, units...].
        probability: σ(a), in the shape of ``h``.
        losses: L of each example, [examples].
        baseline: L̄, one number or one for each unit.

    Raises:
        ArgumentError: losses that are not one for each example, or a baseline that is not finite.

    References:
        Williams, Machine Learning 8 (1992); Bengio, Léonard, Courville, 2013, arXiv:1308.3432.

    >>> p = torch.tensor([[0.6]], dtype=torch.float64)
    >>> reinforce_gradient(torch.ones(1, 1), p, torch.tensor([3.0]), 0.5).item()
    1.0
    """
    per_example = _per_example(losses, h)
    baseline = torch.as_tensor(baseline, dtype=probability.dtype, device=probability.device)
    if not bool(torch.isfinite(baseline).all()):
        raise ArgumentError(f"baseline={baseline}: must be finite")
    return (h - probability) * (per_example - baseline)


def _per_example(losses: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Return the losses so that they broadcast against the units' outputs."""
    if not isinstance(losses, torch.Tensor):
        raise DtypeError(f"losses: must be a tensor, not {type(losses).__name__}")
    if h.dim() == 0 or losses.dim() != 1 or losses.shape[0] != h.shape[0]:
        raise ArgumentError(
            f"losses: shape {tuple(losses.shape)} for units of shape {tuple(h.shape)}; must be the loss of each example"
        )
    return losses.detach().to(torch.promote_types(h.dtype, torch.float32)).view(-1, *(1,) * (h.dim() - 1))


def _check_baseline(baseline: Any) -> str | float:
    legal = f"baseline={baseline!r}: must be 'minimum_variance' or a finite number"
    if isinstance(baseline, bool) or not isinstance(baseline, (str, int, float)):
        raise DtypeError(legal)
    if baseline != "minimum_variance" and (isinstance(baseline, str) or not math.isfinite(baseline)):
        raise ArgumentError(legal)
    return baseline


class ReinforceNeuron(nn.Module):
    r"""Stochastic binary units whose gradient is estimated from the loss alone, with a baseline for each unit.

    .. math:: h \sim \mathrm{Bernoulli}(\sigma(a)), \quad g_a = (h - \sigma(a))(L - \bar L), \quad
              \bar L_i = \frac{E[(h_i - \sigma_i)^2 L]}{E[(h_i - \sigma_i)^2]}

    This baseline has the least variance of all constants; both means are running ones, renewed after use, so that a
    sample never meets a baseline that knows it. After the forward pass add ``term(losses)`` to the mean loss. The units
    pass no other gradient. In evaluation h = 1[a > 0].

    Args:
        units: number of units, the size of the last axis of the input.
        baseline: ``"minimum_variance"``, or a fixed number; 0 is the plain estimator.
        decay: ρ of the running means; 0.9 is our default.
        epsilon: least denominator of the baseline.
        generator: of the random numbers; PyTorch's default one if None.

    References:
        Bengio, Léonard, Courville, 2013, arXiv:1308.3432.

    >>> neuron = ReinforceNeuron(2)
    >>> a = torch.zeros(4, 2, requires_grad=True); h = neuron(a)
    >>> neuron.term(torch.ones(4)).backward(); bool((a.grad.abs() == 0.125).all())
    True
    """

    numerator: torch.Tensor
    denominator: torch.Tensor

    def __init__(
        self,
        units: int,
        baseline: str | float = "minimum_variance",
        *,
        decay: float = 0.9,
        epsilon: float = 1e-8,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_integer(units, "units", 1)
        self.baseline = _check_baseline(baseline)
        self.decay = check_number(decay, "decay", 0.0, 1.0, open_high=True)
        self.epsilon = check_number(epsilon, "epsilon", 0.0, open_low=True)
        self.generator = generator
        self.register_buffer("numerator", torch.zeros(units))
        self.register_buffer("denominator", torch.zeros(units))
        self._latest: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        """Return 0 or 1 for each pre-activation [examples, ..., units]; in training, remember them for ``term``."""
        check_float_tensor(a, "a")
        if a.dim() < 2 or a.shape[-1] != self.numerator.numel():
            raise ArgumentError(f"a: shape {tuple(a.shape)}; must be [examples, ..., {self.numerator.numel()}]")
        values = a.detach()
        if not self.training:
            return torch.where(torch.isnan(values), values, (values > 0).to(values.dtype))
        p = firing_probability(values, "sigmoid")
        h = bernoulli(p, self.generator)
        self._latest = (a, h, p)
        return h.to(a.dtype)

    def term(self, losses: torch.Tensor) -> torch.Tensor:
        """Return a scalar of value 0 whose gradient by the pre-activations is the estimate, for the mean loss.

        Args:
            losses: the loss of each example of the latest forward pass, [examples].

        Raises:
            ArgumentError: no forward pass in training came before, or losses of another shape.
        """
        if self._latest is None:
            raise ArgumentError("losses: no forward pass in training mode came before")
        a, h, p = self._latest
        estimate = reinforce_gradient(h, p, losses, self.current_baseline())
        self._update(h, p, losses)
        self._latest = None
        surrogate = (estimate.to(a.dtype) * a).sum() / max(h.shape[0], 1)
        return surrogate - surrogate.detach()

    def current_baseline(self) -> torch.Tensor:
        """Return L̄ of each unit."""
        if not isinstance(self.baseline, str):
            return torch.full_like(self.numerator, self.baseline)
        return self.numerator / self.denominator.clamp(min=self.epsilon)

    def _update(self, h: torch.Tensor, p: torch.Tensor, losses: torch.Tensor) -> None:
        """Renew the running means by the batch's, unless those are not finite."""
        square = (h - p).square().reshape(-1, h.shape[-1]).to(self.denominator.dtype)
        loss = _per_example(losses, h).expand(h.shape).reshape(-1, h.shape[-1]).to(self.denominator.dtype)
        new = ((square * loss).mean(0), square.mean(0))
        if isinstance(self.baseline, str) and square.numel() and all(bool(torch.isfinite(t).all()) for t in new):
            for mean, value in zip((self.numerator, self.denominator), new, strict=True):
                mean.mul_(self.decay).add_(value, alpha=1.0 - self.decay)
