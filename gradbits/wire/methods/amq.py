r"""AMQ: exponential levels whose multiplier follows the gradient (AGQ in the survey literature)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradbits.wire.adaptive import AdaptiveCodec
from gradbits.wire.bucketed import with_mirror
from gradbits.wire.density import Density
from gradbits.wire.multiplier import optimal_multiplier, power_grid


@dataclass(frozen=True, kw_only=True)
class AMQ(AdaptiveCodec):
    r"""Round stochastically to the levels :math:`\pm p^j` with the p of least expected variance.

    .. math:: \min_p \psi(p) = \int_0^{p^s}(p^{2s} - r^2)\,dF
              + \sum_{j<s}\int_{p^{j+1}}^{p^j}(p^j - r)(r - p^{j+1})\,dF, \qquad s = 2^{b-1} - 1

    The authors descend along the gradient of p from several starts; here a scan of p in [0.001, 0.999] and bisection on
    :math:`\psi'` find the minimum to the last digit.

    Args:
        bits: b, 2 to 8 (1 with ``layout="signed"``: only -1 and 1).
        bucket: B, values per norm.
        norm: ``"l2"`` or ``"linf"``.
        layout: ``"signed"``, without a zero as in the authors' code, or ``"magnitude"``: :math:`0, p^{s-1}, \dots, 1`.
        norm_power, norm_less, ignore_small, schedule: as for ``AdaptiveCodec``.

    Raises:
        ArgumentError: an option outside its range.

    References:
        Faghri et al., Adaptive Gradient Quantization for Data-Parallel SGD, NeurIPS 2020, arXiv:2010.12460.

    >>> codec = AMQ(bits=3, bucket=64)
    >>> _ = torch.manual_seed(0)
    >>> state = codec.adapt(codec.init_state(), codec.statistics(torch.randn(4096)))
    >>> [round(level, 2) for level in state["levels"].tolist()[4:]]
    [0.05, 0.14, 0.38, 1.0]
    """

    @property
    def name(self) -> str:
        return "amq"

    def solve(self, density: Density, levels: torch.Tensor) -> torch.Tensor:
        count = self.magnitudes(levels).numel()
        p = optimal_multiplier(density.folded(), count, self.central)
        return with_mirror(power_grid(torch.tensor(p, dtype=torch.float64), count, self.central), self.layout)
