"""MinMaxUInt8: 255 equal steps between the least and the largest value, rounded to nearest (Bagua's ByteGrad)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradbits.core.checks import check_number
from gradbits.core.errors import CorruptDataError
from gradbits.kernels.quantize import Noise
from gradbits.wire.codec import Codec, Payload, State, check_payload, check_values, restore

_STEPS = 255


@dataclass(frozen=True, kw_only=True)
class MinMaxUInt8(Codec):
    r"""Round every value to the nearest of 256 equally spaced ones between minimum and maximum of the tensor.

    .. math:: s = \frac{255}{\max - \min + \epsilon}, \quad u = \mathrm{round}(s\max), \quad
              q = \min(\mathrm{round}(s\,x), u) - (u - 255), \qquad \hat x = \frac{q + u - 255}{s}

    Rounding is half to even; codes stay within 0 and 255. Deterministic, so biased.

    Args:
        eps: :math:`\epsilon`, at least 0; a tensor with a much smaller range is rounded to one value.

    Raises:
        ArgumentError: an option outside its range.

    References:
        Gan et al., BAGUA: Scaling up Distributed Learning with System Relaxations, VLDB 2021, arXiv:2107.01499; the
        formula is that of its code.

    >>> codec = MinMaxUInt8()
    >>> payload = codec.encode(torch.tensor([-1.0, 0.0, 1.0]))
    >>> payload.parts["codes"].tolist(), payload.nbytes
    ([0, 127, 255], 15)
    """

    eps: float = 1e-7

    def __post_init__(self) -> None:
        check_number(self.eps, "eps", 0.0)

    @property
    def name(self) -> str:
        return "minmax_uint8"

    @property
    def unbiased(self) -> bool:
        return False

    def encode(self, x: torch.Tensor, key: Noise = None, state: State | None = None) -> Payload:
        flat = check_values(x)
        ends = torch.stack(torch.aminmax(flat)) if flat.numel() else flat.new_zeros(2)
        scale, top = _scale(float(ends[0]), float(ends[1]), self.eps)
        codes = (flat * scale).round_().double().clamp_(top - _STEPS, top).sub_(top - _STEPS).to(torch.uint8)
        parts = {"codes": codes, "ends": torch.cat([ends, ends.new_tensor([self.eps])])}
        return Payload(codec=self.name, shape=x.shape, dtype=x.dtype, bits=8, parts=parts)

    def decode(self, payload: Payload) -> torch.Tensor:
        count = check_payload(payload, self.name, least_bits=8)
        codes = payload.part("codes", torch.uint8, count)
        low, high, eps = payload.part("ends", torch.float32, 3).tolist()
        if not (torch.finfo(torch.float32).min <= low <= high <= torch.finfo(torch.float32).max and 0 <= eps < 1e38):
            raise CorruptDataError(f"payload: ends {low} and {high} and eps {eps} are not possible")
        scale, top = _scale(low, high, eps)
        largest = torch.finfo(torch.float32).max
        values = ((codes.double() + (top - _STEPS)) / scale).clamp_(-largest, largest) if scale else codes.double() * 0
        return restore(values.float(), payload)


def _scale(low: float, high: float, eps: float) -> tuple[float, float]:
    """Return s and u, computed in float32 where that holds the range; s is 0 where all values are 0."""
    ends = torch.tensor([low, high, eps], dtype=torch.float32)
    width = float(ends[1] - ends[0] + ends[2])
    if width == float("inf"):
        width = high - low + eps
    width = width or abs(high)
    if not width:
        return 0.0, 0.0
    scale = torch.tensor(_STEPS / width, dtype=torch.float64).clamp(max=1e38).float()
    return float(scale), float((ends[1] * scale).round())
