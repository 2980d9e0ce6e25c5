"""TopK: the values of largest magnitude, with their places."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradbits.core.checks import check_number
from gradbits.core.errors import CorruptDataError
from gradbits.kernels.quantize import Noise
from gradbits.wire.codec import Codec, Payload, State, check_payload, check_values, restore

_LEAST = 1e-4  # of the values are sent, so that a receiver's memory is bounded by what it receives
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class TopK(Codec):
    r"""Send the :math:`k = \max(1, \lfloor\rho d\rfloor)` values of largest magnitude exactly, the others as 0.

    A value takes 32 bits (16 in float16 and bfloat16) and its place 32. Deterministic, so biased; what it loses is less
    than what it gets, :math:`\|v - \hat v\|^2 \le (1 - k/d)\,\|v\|^2`.

    Args:
        ratio: :math:`\rho`, in [0.0001, 1].

    Raises:
        ArgumentError: an option outside its range.

    References:
        Aji and Heafield, Sparse Communication for Distributed Gradient Descent, EMNLP 2017, arXiv:1704.05021; Stich et
        al., Sparsified SGD with Memory, NeurIPS 2018, arXiv:1809.07599.

    >>> codec = TopK(ratio=0.5)
    >>> codec.decode(codec.encode(torch.tensor([1.0, -3.0, 2.0, 0.0]))).tolist()
    [0.0, -3.0, 2.0, 0.0]
    """

    ratio: float = 0.01

    def __post_init__(self) -> None:
        check_number(self.ratio, "ratio", _LEAST, 1.0)

    @property
    def name(self) -> str:
        return "topk"

    @property
    def unbiased(self) -> bool:
        return self.ratio == 1.0

    @property
    def has_codes(self) -> bool:
        return False

    def encode(self, x: torch.Tensor, key: Noise = None, state: State | None = None) -> Payload:
        flat = check_values(x)
        kept = min(max(1, int(flat.numel() * self.ratio)), flat.numel())
        places = torch.topk(flat.abs(), kept, sorted=False).indices.sort().values
        values = flat[places].to(x.dtype if x.dtype in _HALF else torch.float32)
        wide = torch.int64 if flat.numel() > 1 << 31 else torch.int32
        parts = {"values": values, "places": places.to(wide)}
        return Payload(codec=self.name, shape=x.shape, dtype=x.dtype, parts=parts)

    def decode(self, payload: Payload) -> torch.Tensor:
        count = check_payload(payload, self.name, most_bits=0)
        places = payload.parts.get("places", torch.zeros(0))
        kept = places.numel()
        wide = torch.int64 if count > 1 << 31 else torch.int32
        payload.part("places", wide, kept)
        values = payload.parts.get("values", places)
        narrow = payload.dtype in _HALF and values.dtype == payload.dtype  # error feedback has float32 values
        values = payload.part("values", payload.dtype if narrow else torch.float32, kept)
        if kept > count or kept < int(count * _LEAST) or (count and not kept):
            raise CorruptDataError(f"payload: {kept} values of {count} are not possible")
        if kept and not bool((places.diff() > 0).all() & (places[0] >= 0) & (places[-1] < count)):
            raise CorruptDataError(f"payload: places must increase and lie in [0, {count})")
        if not bool(torch.isfinite(values).all()):
            raise CorruptDataError("payload: a value is not finite")
        flat = torch.zeros(count, dtype=torch.float32, device=values.device)
        flat[places.long()] = values.float()
        return restore(flat, payload)
