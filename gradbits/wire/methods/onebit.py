"""One bit per value: the sign, with one mean for each side (1-bit SGD) or one scale for both (signSGD)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradbits.core.errors import CorruptDataError
from gradbits.core.packing import symbol_bytes
from gradbits.kernels.dispatch import Request, run
from gradbits.kernels.quantize import Noise
from gradbits.wire.codec import Codec, Payload, State, check_payload, check_values, restore


@dataclass(frozen=True, kw_only=True)
class OneBit(Codec):
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

    @property
    def unbiased(self) -> bool:
        return False

    def encode(self, x: torch.Tensor, key: Noise = None, state: State | None = None) -> Payload:
        flat = check_values(x)
        positive = flat >= 0
        count = torch.count_nonzero(positive)
        high = (flat.clamp(min=0).sum(dtype=torch.float64) / count.clamp(min=1)).float()
        low = (flat.clamp(max=0).sum(dtype=torch.float64) / (flat.numel() - count).clamp(min=1)).float()
        return _payload(self.name, x, positive, torch.stack([low, high]))

    def decode(self, payload: Payload) -> torch.Tensor:
        return _decode(payload, self.name)


@dataclass(frozen=True, kw_only=True)
class Sign(Codec):
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

    @property
    def unbiased(self) -> bool:
        return False

    def encode(self, x: torch.Tensor, key: Noise = None, state: State | None = None) -> Payload:
        flat = check_values(x)
        scale = (flat.abs().sum(dtype=torch.float64) / max(flat.numel(), 1)).float()
        return _payload(self.name, x, flat >= 0, torch.stack([-scale, scale]))

    def decode(self, payload: Payload) -> torch.Tensor:
        return _decode(payload, self.name)

    def decode_into(self, payload: Payload, out: torch.Tensor, *, add: bool = False) -> None:
        if payload.dtype == torch.float32 and payload.device == out.device:
            _decode_values(payload, self.name, out, add)
        else:
            super().decode_into(payload, out, add=add)


def _payload(name: str, x: torch.Tensor, positive: torch.Tensor, values: torch.Tensor) -> Payload:
    codes = run("pack_symbols", Request(x.device.type), "auto", positive.to(torch.uint8), 1)
    return Payload(codec=name, shape=x.shape, dtype=x.dtype, bits=1, parts={"codes": codes, "values": values})


def _decode(payload: Payload, name: str) -> torch.Tensor:
    return restore(_decode_values(payload, name), payload)


def _decode_values(payload: Payload, name: str, out: torch.Tensor | None = None, add: bool = False) -> torch.Tensor:
    count = check_payload(payload, name, least_bits=1, most_bits=1)
    codes = payload.part("codes", torch.uint8, symbol_bytes(1, count))
    values = payload.part("values", torch.float32, 2)
    if not bool(torch.isfinite(values).all()):
        raise CorruptDataError("payload: a value is not finite")
    norms = torch.ones(1, device=codes.device)
    request = Request(codes.device.type)
    decoded: torch.Tensor = run(
        "decode_buckets", request, "auto", codes, norms, values, max(count, 1), 1, count, out, add
    )
    return decoded
