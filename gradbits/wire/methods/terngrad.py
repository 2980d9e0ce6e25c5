"""TernGrad: stochastic rounding to -1, 0 and 1 times the largest magnitude."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradbits.core.checks import check_choice, check_number
from gradbits.core.errors import ArgumentError
from gradbits.kernels.quantize import Noise
from gradbits.wire.bucketed import LevelCodec
from gradbits.wire.codec import Payload, State, check_values


@dataclass(frozen=True, kw_only=True)
class TernGrad(LevelCodec):
    r"""Round every value stochastically to :math:`\{-1, 0, 1\}` times its bucket's largest magnitude.

    .. math:: \tilde v_i = s\cdot\mathrm{sgn}(v_i)\cdot[u_i < |v_i|/s], \qquad s = \max_i |v_i|

    Clipping the values first, :math:`|v_i| \le c\,\sigma` with the standard deviation :math:`\sigma` of the tensor,
    keeps s small; what is clipped off makes the estimate biased.

    Args:
        bits: 2, what three levels take.
        bucket: B, values per maximum; the paper has one per layer.
        norm: ``"linf"``.
        layout: ``"magnitude"``.
        clip: c, above 0, or None for no clipping; 2.5 in the paper.

    Raises:
        ArgumentError: an option outside its range.

    References:
        Wen et al., TernGrad: Ternary Gradients to Reduce Communication in Distributed Deep Learning, NIPS 2017,
        arXiv:1705.07878.

    >>> codec = TernGrad()
    >>> sorted(set(codec.decode(codec.encode(torch.tensor([0.0, 2.0, -2.0]))).tolist()))
    [-2.0, 0.0, 2.0]
    """

    bits: int = 2
    norm: str = "linf"
    layout: str = "magnitude"
    clip: float | None = None

    def __post_init__(self) -> None:
        LevelCodec.__post_init__(self)
        if self.bits != 2:
            raise ArgumentError(f"bits={self.bits!r}: TernGrad has three levels, so 2 bits")
        check_choice(self.norm, "norm", ("linf",))
        check_choice(self.layout, "layout", ("magnitude",))
        if self.clip is not None:
            check_number(self.clip, "clip", 0.0, open_low=True)

    @property
    def name(self) -> str:
        return "terngrad"

    @property
    def unbiased(self) -> bool:
        return self.clip is None

    @property
    def wants_feedback(self) -> bool:
        return False  # its noise, often larger than the gradient, would pile up in the residual

    @property
    def multiplier(self) -> float:
        return 0.0

    def encode(self, x: torch.Tensor, key: Noise = None, state: State | None = None) -> Payload:
        flat = check_values(x)
        if self.clip is not None and flat.numel():
            limit = min(self.clip * float(flat.double().std(correction=0)), torch.finfo(torch.float32).max)
            x = flat.clamp(-limit, limit).reshape(x.shape).to(x.dtype)
        return LevelCodec.encode(self, x, key, state)
