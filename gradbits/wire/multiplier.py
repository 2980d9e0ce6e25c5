r"""The multiplier of exponential levels that makes the expected variance small: the optimizer behind AMQ.

The magnitudes are :math:`1, p, p^2, \dots, p^s`. Without a zero level (``central``) what lies below :math:`p^s` is
rounded to :math:`\pm p^s`; with one, :math:`0, p^{s-1}, \dots, 1`, to 0 or :math:`p^{s-1}`.

.. math:: \psi(p) = \int_0^{p^s}(p^{2s} - r^2)\,dF + \sum_{j<s}\int_{p^{j+1}}^{p^j}(p^j - r)(r - p^{j+1})\,dF
"""

from __future__ import annotations

import torch

from gradbits.wire.density import Density
from gradbits.wire.levels import expected_variance, gradient

LOWEST, HIGHEST = 1e-3, 1 - 1e-3  # where p is sought
_POINTS = 400
_BISECTIONS = 60


def power_grid(p: torch.Tensor, count: int, central: bool) -> torch.Tensor:
    """Return the magnitudes in increasing order, shape [..., count], for every p: powers, or 0 and powers.

    >>> power_grid(torch.tensor([0.5]), 3, False).tolist(), power_grid(torch.tensor([0.5]), 3, True).tolist()
    ([[0.0, 0.5, 1.0]], [[0.25, 0.5, 1.0]])
    """
    exponents = torch.arange(count - 1, -1, -1, dtype=torch.float64)
    grid = p.double()[..., None] ** exponents
    return grid if central else torch.cat([torch.zeros_like(grid[..., :1]), grid[..., 1:]], -1)


def multiplier_gradient(density: Density, p: torch.Tensor, count: int, central: bool) -> torch.Tensor:
    r"""Return :math:`\psi'(p) = \sum_j j\,p^{j-1}\,\partial\Psi/\partial l_j` for every p.

    >>> one = torch.ones(1, dtype=torch.float64)
    >>> density = Density.of(0 * one, 0.1 * one, one).folded()
    >>> [round(d, 3) for d in multiplier_gradient(density, torch.tensor([0.3, 0.5]), 4, True).tolist()]
    [-0.01, 0.141]
    """
    p = p.double()
    slopes = gradient(density, power_grid(p, count, central), central)
    exponents = torch.arange(slopes.shape[-1], 0, -1, dtype=torch.float64)
    return (slopes * exponents * p[..., None] ** (exponents - 1)).sum(-1)


def optimal_multiplier(density: Density, count: int, central: bool) -> float:
    r"""Return the p in [0.001, 0.999] with the least :math:`\psi(p)`: a scan, then bisection on :math:`\psi'`.

    >>> one = torch.ones(1, dtype=torch.float64)
    >>> round(optimal_multiplier(Density.of(0 * one, 0.1 * one, one).folded(), 4, True), 6)
    0.360294
    """
    grid = LOWEST + (HIGHEST - LOWEST) * torch.arange(_POINTS + 1, dtype=torch.float64) / _POINTS
    best = int(expected_variance(density, power_grid(grid, count, central), central).argmin())
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, _POINTS)]
    for _ in range(_BISECTIONS):
        p = (low + high) / 2
        falling = multiplier_gradient(density, p, count, central) < 0
        low, high = torch.where(falling, p, low), torch.where(falling, high, p)
    return float((low + high) / 2)
