"""One bit per value: the sign, with one mean for each side (1-bit SGD) or one scale for both (signSGD)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradbits.kernels.quantize import Noise
from gradbits.wire.codec import Payload, State, check_values
from gradbits.wire.signs import TwoValued, sign_payload


@dataclass(frozen=True, kw_only=True)
class OneBit(TwoValued):
    r"""Send which values are negative, and the mean of those and of the others.

    .. math:: \hat v_i = \mathrm{mean}\{v_k : v_k < 0\} \text{ if } v_i < 0, \text{ else }
              \mathrm{mean}\{v_k : v_k \ge 0\}

    Deterministic, so biased; meant to be used with error feedback.

    References:
        Seide et al., 1-Bit Stochastic Gradient Descent and its Application to Data-Parallel Distributed Training of
        Speech DNNs, Interspeech 2014.

    >>> codec = OneBit()
    >>> codec.decode(codec.encode(torch.tensor([-1.0, -3.0, 2.0, 0.0]))).tolist()
    [-2.0, -2.0, 1.0, 1.0]
    """

    @property
    def name(self) -> str:
        return "onebit"

    def encode(self, x: torch.Tensor, key: Noise = None, state: State | None = None) -> Payload:
        flat = check_values(x)
        positive = flat >= 0
        count = torch.count_nonzero(positive)
        # the sums of the sides, from those of all values and of their magnitudes: no copy of either side
        total, size = flat.sum(dtype=torch.float64), torch.linalg.vector_norm(flat, 1, dtype=torch.float64)
        high = (0.5 * (size + total) / count.clamp(min=1)).float()
        low = (0.5 * (total - size) / (flat.numel() - count).clamp(min=1)).float()
        return sign_payload(self.name, x, positive, torch.stack([low, high]))


@dataclass(frozen=True, kw_only=True)
class Sign(TwoValued):
    r"""Send the signs and the mean magnitude; with error feedback this is EF-signSGD.

    .. math:: \hat v_i = \frac{\|v\|_1}{d}\,\mathrm{sgn}(v_i), \qquad \mathrm{sgn}(0) = 1

    Deterministic, so biased; what it loses is less than what it gets, :math:`\|v - \hat v\| < \|v\|`.

    References:
        Karimireddy et al., Error Feedback Fixes SignSGD and other Gradient Compression Schemes, ICML 2019,
        arXiv:1901.09847.

    >>> codec = Sign()
    >>> codec.decode(codec.encode(torch.tensor([-1.0, 3.0, 2.0, 0.0]))).tolist()
    [-1.5, 1.5, 1.5, 1.5]
    """

    @property
    def name(self) -> str:
        return "sign"

    def encode(self, x: torch.Tensor, key: Noise = None, state: State | None = None) -> Payload:
        flat = check_values(x)
        scale = (torch.linalg.vector_norm(flat, 1, dtype=torch.float64) / max(flat.numel(), 1)).float()
        return sign_payload(self.name, x, flat >= 0, torch.stack([-scale, scale]))
