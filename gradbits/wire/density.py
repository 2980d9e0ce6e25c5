r"""Densities of normalized gradient coordinates: mixtures of normals, cut to an interval, with exact partial moments.

For one component with :math:`\alpha = (a-\mu)/\sigma,\ \beta = (b-\mu)/\sigma` and :math:`\Phi, \varphi` of the
standard normal, before the factor that makes the cut density sum to 1:

.. math:: \int_a^b dF = \Phi(\beta)-\Phi(\alpha) =: M, \qquad
          \int_a^b (r-a)\,dF = \sigma\,[\varphi(\alpha)-\varphi(\beta)-\alpha M]

          \int_a^b (b-r)\,dF = \sigma\,[\varphi(\beta)-\varphi(\alpha)+\beta M], \qquad
          \int_a^b (r-a)(b-r)\,dF = \sigma^2\,[\beta\varphi(\alpha)-\alpha\varphi(\beta)-(1+\alpha\beta)M]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gradbits.core.errors import ArgumentError

SIGMA_FLOOR = 1e-5  # narrower components are widened: far below any useful gap between levels
_ROOT_2PI = math.sqrt(2 * math.pi)
_ITERATIONS = 100  # bisections that exhaust float64, Newton steps among them


@dataclass(frozen=True)
class Density:
    """A mixture of normals on an interval; every number is float64.

    Args:
        mu, sigma: of the components, shape [K].
        factor: what each normal's density is multiplied with, shape [K].
        low, high: ends of the interval.
    """

    mu: torch.Tensor
    sigma: torch.Tensor
    factor: torch.Tensor
    low: float
    high: float

    @staticmethod
    def of(
        mu: torch.Tensor, sigma: torch.Tensor, weight: torch.Tensor, low: float = -1.0, high: float = 1.0
    ) -> Density:
        """Return the mixture of normals truncated to [``low``, ``high``] with weights in proportion to ``weight``.

        Raises:
            ArgumentError: no component with a weight above 0, or numbers that are not finite.

        >>> one = torch.ones(1, dtype=torch.float64)
        >>> Density.of(0 * one, 0.1 * one, one).mass(torch.tensor(-1.0), torch.tensor(0.0)).item()
        0.5
        """
        mu, sigma, weight = (torch.as_tensor(t, dtype=torch.float64).reshape(-1) for t in (mu, sigma, weight))
        finite = all(bool(torch.isfinite(t).all()) for t in (mu, sigma, weight))
        if not finite or not bool((weight >= 0).all()) or not bool((weight > 0).any()):
            raise ArgumentError("weight: a density needs finite components and a weight above 0")
        kept = weight > 0
        mu, sigma, weight = mu[kept].clamp(low, high), sigma[kept].clamp(min=SIGMA_FLOOR), weight[kept]
        raw = Density(mu, sigma, torch.ones_like(mu), low, high)
        inside = raw.per_component(torch.tensor(low), torch.tensor(high))[0]
        return Density(mu, sigma, weight / weight.sum() / inside, low, high)

    def folded(self) -> Density:
        """Return the density of :math:`|r|` on [0, ``high``]."""
        return Density(
            torch.cat([self.mu, -self.mu]), self.sigma.repeat(2), self.factor.repeat(2), max(self.low, 0.0), self.high
        )

    def per_component(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return M, alpha and beta of every interval [a, b] and component, shape [..., K]."""
        alpha = (a.double()[..., None] - self.mu) / self.sigma
        beta = (b.double()[..., None] - self.mu) / self.sigma
        # right of the mean the upper tails are subtracted: they are small, so nothing cancels
        flip = alpha + beta > 0
        mass = torch.special.ndtr(torch.where(flip, -alpha, beta)) - torch.special.ndtr(torch.where(flip, -beta, alpha))
        return mass, alpha, beta

    def pdf(self, r: torch.Tensor) -> torch.Tensor:
        """Return the density at ``r``."""
        z = (r.double()[..., None] - self.mu) / self.sigma
        return (_phi(z) / self.sigma * self.factor).sum(-1)

    def mass(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        r"""Return :math:`\int_a^b dF` for a <= b inside the interval."""
        return (self.per_component(a, b)[0] * self.factor).sum(-1)

    def above(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        r"""Return :math:`\int_a^b (r-a)\,dF`."""
        mass, alpha, beta = self.per_component(a, b)
        return ((_phi(alpha) - _phi(beta) - alpha * mass) * self.sigma * self.factor).sum(-1).clamp(min=0)

    def below(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        r"""Return :math:`\int_a^b (b-r)\,dF`."""
        mass, alpha, beta = self.per_component(a, b)
        return ((_phi(beta) - _phi(alpha) + beta * mass) * self.sigma * self.factor).sum(-1).clamp(min=0)

    def rounding_variance(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        r"""Return :math:`\int_a^b (r-a)(b-r)\,dF`, what stochastic rounding to a and b adds."""
        mass, alpha, beta = self.per_component(a, b)
        inner = beta * _phi(alpha) - alpha * _phi(beta) - (1 + alpha * beta) * mass
        return (inner * self.sigma**2 * self.factor).sum(-1).clamp(min=0)

    def central_variance(self, b: torch.Tensor) -> torch.Tensor:
        r"""Return :math:`\int_0^b (b^2-r^2)\,dF`: magnitudes below the least level b go to b or -b."""
        mass, alpha, beta = self.per_component(torch.zeros_like(b), b)
        at_0, at_b = _phi(alpha), _phi(beta)
        spread = mass - (beta * at_b - alpha * at_0)
        second = self.mu**2 * mass + 2 * self.mu * self.sigma * (at_0 - at_b) + self.sigma**2 * spread
        return ((b.double()[..., None] ** 2 * mass - second) * self.factor).sum(-1).clamp(min=0)

    def invert(
        self, a: torch.Tensor, c: torch.Tensor, mass: torch.Tensor, start: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return x in [a, c] with ``mass(a, x) == mass``, sought from ``start`` on."""
        return root(lambda x: (self.mass(a, x) - mass, self.pdf(x)), a, c, start)

    def quantiles(self, count: int) -> torch.Tensor:
        """Return ``count`` points, the ends among them, with equal mass in between."""
        share = torch.arange(1, count - 1, dtype=torch.float64) / (count - 1)
        low, high = torch.full_like(share, self.low), torch.full_like(share, self.high)
        inner = self.invert(low, high, share * self.mass(low, high))
        return torch.cat([torch.tensor([self.low]).double(), inner, torch.tensor([self.high]).double()])


def root(
    rising: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    low: torch.Tensor,
    high: torch.Tensor,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return where a rising function is 0: bisection, by Newton steps where they stay in the bracket.

    Args:
        rising: returns value and derivative, elementwise.
        low, high: the bracket.
        start: first guess inside the bracket; its middle by default.

    >>> root(lambda x: (x * x - 2, 2 * x), torch.zeros(1).double(), torch.full((1,), 2.0).double())
    tensor([1.4142], dtype=torch.float64)
    """
    low, high = low.double(), high.double()
    x = (low + high) / 2 if start is None else start
    close = 1e-11 * (high - low)
    for _ in range(_ITERATIONS):
        value, slope = rising(x)
        under = value < 0
        low, high = torch.where(under, x, low), torch.where(under, high, x)
        move = value / slope  # not finite on a plateau, then it leads out of the bracket
        step = x - move
        following = torch.where((step > low) & (step < high), step, (low + high) / 2)
        # a step that leads nowhere, or out of the bracket by a rounding error, means that x is the root
        done = (move.abs() <= close) | (high - low <= close) | (value == 0)
        x = torch.where(done, x, following)
        if bool(done.all()):
            break
    return x


def _phi(z: torch.Tensor) -> torch.Tensor:
    return torch.exp(-0.5 * z * z) / _ROOT_2PI
