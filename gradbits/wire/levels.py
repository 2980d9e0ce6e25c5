r"""Levels that make the expected variance of stochastic rounding small: the optimizers behind ALQ and ALQ-G.

.. math:: \Psi(l) = \sum_j \int_{l_j}^{l_{j+1}} (r - l_j)(l_{j+1} - r)\,dF(r)

The end levels are fixed. A grid is one of two kinds, both sorted float64 vectors:

* from end to end: the first and the last level are fixed (-1 and 1, or 0 and 1 for magnitudes with a zero);
* ``central``: magnitudes without a zero, of which only the last (1) is fixed. What lies below the least magnitude
  :math:`l_1` is rounded to :math:`\pm l_1`, at :math:`\int_0^{l_1} (l_1^2 - r^2)\,dF`.

For every inner level with neighbours a and c the variance is convex in that level, with its minimum where

.. math:: F(l_j^*) - F(a) = \int_a^c \frac{c - r}{c - a}\,dF(r)
"""

from __future__ import annotations

import torch

from gradbits.wire.density import Density, root

_NEWTON_STEPS = 60
_HALVINGS = 30
_EARLY_SWEEPS = 3
_EMPTY = 1e-22  # a bin with less mass adds nothing that float64 shows


def expected_variance(density: Density, grid: torch.Tensor, central: bool = False) -> torch.Tensor:
    r"""Return :math:`\Psi`; ``grid`` may hold several grids, shape [..., levels].

    >>> one = torch.ones(1, dtype=torch.float64)
    >>> round(expected_variance(Density.of(0 * one, 0.1 * one, one), torch.linspace(-1, 1, 8)).item(), 7)
    0.0143422
    """
    total = density.rounding_variance(grid[..., :-1], grid[..., 1:]).sum(-1)
    return total + density.central_variance(grid[..., 0]) if central else total


def gradient(density: Density, grid: torch.Tensor, central: bool = False) -> torch.Tensor:
    r"""Return :math:`\partial\Psi/\partial l_j` of the levels that are free, in their order."""
    inner = density.above(grid[..., :-2], grid[..., 1:-1]) - density.below(grid[..., 1:-1], grid[..., 2:])
    if not central:
        return inner
    first, second = grid[..., :1], grid[..., 1:2]
    pull = 2 * first * density.mass(torch.zeros_like(first), first) - density.below(first, second)
    return torch.cat([pull, inner], -1)


def coordinate_descent(
    density: Density, grid: torch.Tensor, central: bool = False, *, sweeps: int = 30, alternate: bool = True,
    tolerance: float = 0.0,
) -> torch.Tensor:
    """Return ``grid`` after ``sweeps`` sweeps that put every free level at its minimum between its neighbours.

    Args:
        density: of what is rounded.
        grid: start, sorted.
        central: kind of the grid.
        sweeps: number of sweeps.
        alternate: whether a sweep takes every other level at once and then the rest (levels that are not neighbours do
            not touch each other), rather than one after the other.
        tolerance: stop when a sweep lowers the variance by less than this, relatively.

    >>> one, start = torch.ones(1, dtype=torch.float64), torch.linspace(0, 1, 5, dtype=torch.float64)[1:]
    >>> grid = coordinate_descent(Density.of(0 * one, 0.1 * one, one).folded(), start, central=True)
    >>> [round(level, 3) for level in grid.tolist()]
    [0.038, 0.122, 0.251, 1.0]
    """
    grid = grid.double().clone()
    free = range(0 if central else 1, grid.numel() - 1)
    turns = [list(free)[0::2], list(free)[1::2]] if alternate else [[j] for j in free]
    value = expected_variance(density, grid, central)
    for _ in range(sweeps):
        for turn in turns:
            if turn and turn[0] == 0:
                grid[0] = _central_minimum(density, grid[:1], grid[1:2])[0]
                turn = turn[1:]
            if turn:
                index = torch.tensor(turn)
                grid[index] = _inner_minimum(density, grid[index - 1], grid[index], grid[index + 1])
        before, value = value, expected_variance(density, grid, central)
        if bool(before - value <= tolerance * value):
            break
    return grid


def _inner_minimum(density: Density, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    found = (a + c) / 2  # where there is no mass every place is as good
    some = density.mass(a, c) > _EMPTY
    if bool(some.any()):
        a_, b_, c_ = a[some], b[some], c[some]
        found[some] = density.invert(a_, c_, density.below(a_, c_) / (c_ - a_), b_)
    margin = 1e-9 * (c - a)
    return torch.maximum(torch.minimum(found, c - margin), a + margin)


def _central_minimum(density: Density, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    zero = torch.zeros_like(c)

    def rising(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mass = density.mass(zero, x)
        return 2 * x * mass - density.below(x, c), 2 * mass + (x + c) * density.pdf(x)

    margin = 1e-9 * c
    return root(rising, zero, c, b).clamp(margin, c - margin)


def newton(density: Density, grid: torch.Tensor, central: bool = False) -> torch.Tensor:
    """Return ``grid`` moved to the stationary point nearby by Newton steps on all free levels at once.

    Coordinate descent crawls where there are many levels; this ends it. A step is taken only if the levels stay in
    order and the variance falls, else it is halved.
    """
    grid = grid.double().clone()
    start, stop = (0 if central else 1), grid.numel() - 1
    if stop <= start:
        return grid
    value = expected_variance(density, grid, central)
    for _ in range(_NEWTON_STEPS):
        slope = gradient(density, grid, central)
        between = density.mass(grid[:-1], grid[1:])
        at = density.pdf(grid[start:stop])
        below = grid[start - 1 : stop - 1] if start else torch.cat([grid.new_zeros(1), grid[: stop - 1]])
        diagonal = (grid[start + 1 :] - below) * at
        if central:
            zero = grid.new_zeros(1)
            diagonal[0] = (2 * density.mass(zero, grid[:1]) + (grid[0] + grid[1]) * at[:1])[0]
        beside = -between[start : stop - 1]
        hessian = torch.diag(diagonal) + torch.diag(beside, 1) + torch.diag(beside, -1)
        step, failed = torch.linalg.solve_ex(hessian, slope)
        if int(failed) or not bool(torch.isfinite(step).all()) or float(step @ slope) <= 0:
            break
        size = 1.0
        for _ in range(_HALVINGS):
            trial = grid.clone()
            trial[start:stop] -= size * step
            if bool((trial.diff() > 0).all()) and float(trial[0]) >= density.low:
                lower = expected_variance(density, trial, central)
                if bool(lower < value):
                    break
            size /= 2
        else:
            break
        grid, value = trial, lower
    return grid


def projected_gradient(
    density: Density, grid: torch.Tensor, central: bool = False, *, rate: float = 0.1, sweeps: int = 30
) -> torch.Tensor:
    r"""Return ``grid`` after sweeps of gradient steps, each at most half way to the nearer neighbour (ALQ-G).

    .. math:: l_j \leftarrow l_j - \mathrm{sgn}(\partial_j\Psi)\,\min(\eta\,|\partial_j\Psi|,\ D_j/2)

    Args:
        density, grid, central: as for ``coordinate_descent``.
        rate: :math:`\eta`.
        sweeps: number of sweeps, the levels one after the other.
    """
    grid = grid.double().clone()
    for _ in range(sweeps):
        for j in range(0 if central else 1, grid.numel() - 1):
            around = grid[max(j - 1, 0) : j + 2]
            if j:
                slope = gradient(density, around)[0]
                room = min(around[1] - around[0], around[2] - around[1])
            else:
                slope = gradient(density, around, central=True)[0]
                room = min(around[0], around[1] - around[0])
            grid[j] -= torch.sign(slope) * min(rate * slope.abs(), room / 2)
    return grid


def best_of(density: Density, grids: list[torch.Tensor], central: bool) -> torch.Tensor:
    """Return the grid with the least expected variance; the first of equals."""
    return grids[int(torch.stack([expected_variance(density, grid, central) for grid in grids]).argmin())]


def optimal_levels(
    density: Density, starts: list[torch.Tensor], central: bool = False, *, sweeps: int = 30
) -> torch.Tensor:
    """Return the best grid that coordinate descent reaches from several starts, brought to its stationary point.

    A start that after a few sweeps is ten times worse than another is given up.
    """
    early = min(_EARLY_SWEEPS, sweeps)
    grids = [coordinate_descent(density, start, central, sweeps=early) for start in starts]
    values = [float(expected_variance(density, grid, central)) for grid in grids]
    hopeful = [grid for grid, value in zip(grids, values, strict=True) if value <= 10 * min(values)]
    rest = sweeps - early
    found = [coordinate_descent(density, grid, central, sweeps=rest, tolerance=1e-4) for grid in hopeful]
    return newton(density, best_of(density, found, central), central)


def spread_levels(density: Density, count: int) -> torch.Tensor:
    """Return ``count`` points, the ends among them, spaced for many levels: their density is that of F to the 1/3.

    >>> one = torch.ones(1, dtype=torch.float64)
    >>> spread_levels(Density.of(0 * one, 1000 * one, one), 3).abs().round(decimals=6).tolist()
    [1.0, 0.0, 1.0]
    """
    points = 1 << 12
    share = torch.arange(1, points, dtype=torch.float64) / points
    # where F is narrow, quantiles show it and an even grid does not; where it is thin, it is the other way round
    even = density.low + (density.high - density.low) * share
    fine = torch.cat([density.quantiles(points + 1), even]).sort().values
    middle = (fine[1:] + fine[:-1]) / 2
    grown = torch.cat([fine.new_zeros(1), (density.pdf(middle).pow(1 / 3) * fine.diff()).cumsum(0)])
    wanted = torch.arange(count, dtype=torch.float64) / (count - 1) * grown[-1]
    place = torch.searchsorted(grown, wanted[1:-1]).clamp(1, fine.numel() - 1)
    step = (grown[place] - grown[place - 1]).clamp(min=1e-300)
    inner = fine[place - 1] + (wanted[1:-1] - grown[place - 1]) / step * (fine[place] - fine[place - 1])
    return torch.cat([fine[:1], inner, fine[-1:]])
