"""Codecs that send one bit per value, for one of two values: what 1-bit SGD and signSGD share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradbits.core.errors import CorruptDataError
from gradbits.core.packing import symbol_bytes
from gradbits.kernels.dispatch import Request, run
from gradbits.wire.codec import Codec, Payload, check_payload, restore


@dataclass(frozen=True, kw_only=True)
class TwoValued(Codec):
    """A codec that sends one of two values for each; the base of those that differ in how they choose them."""

    @property
    def unbiased(self) -> bool:
        return False

    def decode(self, payload: Payload) -> torch.Tensor:
        return restore(decode_signs(payload, self.name), payload)

    def decode_into(self, payload: Payload, out: torch.Tensor, *, add: bool = False) -> None:
        if payload.dtype == torch.float32 and payload.device == out.device:
            decode_signs(payload, self.name, out, add)
        else:
            super().decode_into(payload, out, add=add)


def sign_payload(name: str, x: torch.Tensor, positive: torch.Tensor, values: torch.Tensor) -> Payload:
    """Return the payload of ``x``: which values are ``positive``, and the two ``values`` that stand for them."""
    codes = run("pack_symbols", Request(x.device.type), "auto", positive.view(torch.uint8), 1)
    return Payload(codec=name, shape=x.shape, dtype=x.dtype, bits=1, parts={"codes": codes, "values": values})


def decode_signs(payload: Payload, name: str, out: torch.Tensor | None = None, add: bool = False) -> torch.Tensor:
    """Return the flat float32 values of a payload of signs, or put them into ``out``.

    Args:
        payload: what ``sign_payload`` made.
        name: of the codec.
        out: flat contiguous float32 of as many elements.
        add: whether ``out`` keeps what it holds.

    Raises:
        CorruptDataError: the parts do not fit together.
    """
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
