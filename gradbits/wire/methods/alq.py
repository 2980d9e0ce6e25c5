r"""ALQ and ALQ-G: levels placed freely where the gradient's coordinates are (AGQ in the survey literature)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradbits.core.checks import check_instance, check_integer, check_number
from gradbits.core.errors import ArgumentError
from gradbits.wire.adaptive import AdaptiveCodec
from gradbits.wire.bucketed import exponential_magnitudes, with_mirror
from gradbits.wire.density import Density
from gradbits.wire.levels import best_of, optimal_levels, projected_gradient, spread_levels


@dataclass(frozen=True, kw_only=True)
class ALQ(AdaptiveCodec):
    r"""Round stochastically to levels that coordinate descent puts where the expected variance is least.

    .. math:: \min_l \Psi(l) = \sum_j \int_{l_j}^{l_{j+1}} (r - l_j)(l_{j+1} - r)\,dF(r), \qquad
              l_j \leftarrow F^{-1}\Big(F(l_{j+1}) - \int_{l_{j-1}}^{l_{j+1}} \frac{r - l_{j-1}}{l_{j+1} - l_{j-1}}\,
              dF(r)\Big)

    F is a mixture of truncated normals, one per bucket, weighted with the buckets' squared norms. Sweeps start from
    several grids; the best result is brought to its stationary point by Newton steps.

    Args:
        bits: b, 2 to 8 (1 with ``layout="signed"``: only -1 and 1).
        bucket: B, values per norm.
        norm: ``"l2"`` or ``"linf"``.
        layout: ``"signed"``, 2^b levels without a zero as in the authors' code, or ``"magnitude"``, with a zero.
        symmetric: whether positive and negative levels mirror each other; else ``layout="signed"`` only.
        sweeps: of coordinate descent, 30 in the authors' experiments.
        norm_power, norm_less, ignore_small, schedule: as for ``AdaptiveCodec``.

    Raises:
        ArgumentError: an option outside its range.

    References:
        Faghri et al., Adaptive Gradient Quantization for Data-Parallel SGD, NeurIPS 2020, arXiv:2010.12460.

    >>> codec = ALQ(bits=3, bucket=64)
    >>> _ = torch.manual_seed(0)
    >>> gradient = torch.randn(4096)
    >>> state = codec.adapt(codec.init_state(), codec.statistics(gradient))
    >>> [round(level, 2) for level in state["levels"].tolist()[4:]]
    [0.05, 0.15, 0.3, 1.0]
    """

    symmetric: bool = True
    sweeps: int = 30

    def __post_init__(self) -> None:
        AdaptiveCodec.__post_init__(self)
        check_symmetric(self.symmetric, self.layout)
        check_integer(self.sweeps, "sweeps", 0)

    @property
    def name(self) -> str:
        return "alq"

    def solve(self, density: Density, levels: torch.Tensor) -> torch.Tensor:
        if not self.symmetric:
            return optimal_levels(density, _full_starts(density, levels, self.bits), sweeps=self.sweeps)
        half = density.folded()
        starts = self.starts(half, self.magnitudes(levels))
        return with_mirror(optimal_levels(half, starts, self.central, sweeps=self.sweeps), self.layout)


@dataclass(frozen=True, kw_only=True)
class ALQG(AdaptiveCodec):
    r"""Round stochastically to levels that projected gradient descent improves (ALQ-G).

    .. math:: l_j \leftarrow l_j - \mathrm{sgn}(\partial_j\Psi)\,\min(\eta\,|\partial_j\Psi|,\ D_j/2), \qquad
              D_j = \min(l_j - l_{j-1},\ l_{j+1} - l_j)

    Args:
        bits, bucket, norm, layout, symmetric: as for ``ALQ``.
        rate: :math:`\eta`, 0.1 in the authors' experiments.
        sweeps: gradient steps per level and update, 30 in the authors' experiments.
        norm_power, norm_less, ignore_small, schedule: as for ``AdaptiveCodec``.

    Raises:
        ArgumentError: an option outside its range.

    References:
        Faghri et al., Adaptive Gradient Quantization for Data-Parallel SGD, NeurIPS 2020, arXiv:2010.12460.

    >>> ALQG(bits=3).levels().tolist()[4:]
    [0.125, 0.25, 0.5, 1.0]
    """

    symmetric: bool = True
    rate: float = 0.1
    sweeps: int = 30

    def __post_init__(self) -> None:
        AdaptiveCodec.__post_init__(self)
        check_symmetric(self.symmetric, self.layout)
        check_number(self.rate, "rate", 0.0, open_low=True)
        check_integer(self.sweeps, "sweeps", 0)

    @property
    def name(self) -> str:
        return "alq_g"

    def solve(self, density: Density, levels: torch.Tensor) -> torch.Tensor:
        half = density.folded() if self.symmetric else density
        central = self.central and self.symmetric
        present = self.magnitudes(levels) if self.symmetric else levels
        starts = self.starts(half, present) if self.symmetric else _full_starts(density, levels, self.bits)
        found = [projected_gradient(half, s, central, rate=self.rate, sweeps=self.sweeps) for s in starts]
        best = best_of(half, found, central)
        return with_mirror(best, self.layout) if self.symmetric else best


def check_symmetric(symmetric: bool, layout: str) -> None:
    """Raise unless ``symmetric`` is a bool that the layout allows."""
    check_instance(symmetric, "symmetric", bool)
    if not symmetric and layout != "signed":
        raise ArgumentError(f"symmetric=False: needs layout='signed'; {layout!r} mirrors its magnitudes")


def _full_starts(density: Density, levels: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """Return levels from -1 to 1 to start from."""
    count = levels.numel()
    even = torch.linspace(-1, 1, count, dtype=torch.float64)
    found = [density.quantiles(count), spread_levels(density, count)]
    apart = [grid if bool((grid.diff() > 1e-12).all()) else 0.999 * grid + 0.001 * even for grid in found]
    return [levels, even, with_mirror(exponential_magnitudes(bits, "signed", 0.5), "signed"), *apart]
