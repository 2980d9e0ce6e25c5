"""NUQSGD: stochastic rounding to exponentially spaced levels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradbits.core.checks import check_number
from gradbits.wire.bucketed import LevelCodec


@dataclass(frozen=True, kw_only=True)
class NUQSGD(LevelCodec):
    r"""Round every value stochastically to the levels :math:`\pm p^j` of its bucket's norm.

    Args:
        bits: b, 2 to 8 (1 with ``layout="signed"``: only -1 and 1).
        bucket: B, values per norm.
        norm: ``"l2"`` or ``"linf"``.
        layout: ``"magnitude"``, magnitudes :math:`0, p^{s-1}, \dots, p, 1` with :math:`s = 2^{b-1} - 1`, the paper's;
            or ``"signed"``, :math:`\pm p^s, \dots, \pm 1`, the authors' code, which has no zero.
        p: ratio of neighbours, from 0.000001 to 0.999999.

    Raises:
        ArgumentError: an option outside its range.

    References:
        Ramezani-Kebrya et al., NUQSGD: Provably Communication-Efficient Data-Parallel SGD via Nonuniform Quantization,
        JMLR 2021, arXiv:1908.06077.

    >>> NUQSGD(bits=3).levels().tolist()
    [-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0]
    """

    bits: int = 4
    layout: str = "magnitude"
    p: float = 0.5

    def __post_init__(self) -> None:
        LevelCodec.__post_init__(self)
        check_number(self.p, "p", 1e-6, 1.0 - 1e-6)

    @property
    def name(self) -> str:
        return "nuqsgd"

    @property
    def multiplier(self) -> float:
        return float(np.float32(self.p))  # as it travels
