r"""Codecs that round stochastically to levels: what QSGD, NUQSGD, TernGrad, ALQ and AMQ share.

.. math:: \hat v_i = \|v\|\cdot\mathrm{SR}(v_i/\|v\|;\ l_j, l_{j+1}), \qquad l_j \le v_i/\|v\| \le l_{j+1}

The methods differ in the levels, in the norm and in whether they adapt. Every bucket v of B consecutive values sends
its norm, every value a symbol of b bits. The mean of what is decoded is v to within :math:`2^{-17}` of a gap between
levels (the noise has 16 bits), so no error feedback is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gradbits.core.checks import check_bits, check_choice
from gradbits.core.errors import CorruptDataError
from gradbits.core.packing import symbol_bytes
from gradbits.kernels.dispatch import Request, run
from gradbits.kernels.quantize import Noise
from gradbits.wire.codec import (
    Codec,
    Payload,
    State,
    check_bucket,
    check_finite,
    check_payload,
    flat_values,
    noise_key,
    restore,
)

NORMS = {"l2": 2.0, "linf": float("inf")}
LAYOUTS = ("signed", "magnitude")
_GAP = np.float32(2.0**-127)  # between levels: its reciprocal is finite
_ONE = np.float32(1.0)


@dataclass(frozen=True, kw_only=True)
class LevelCodec(Codec):
    """A codec with levels from -1 to 1 and a norm per bucket; the base of those that differ in the levels.

    Args:
        bits: b, bits of one symbol, the sign among them.
        bucket: B, values per norm.
        norm: ``"l2"`` or ``"linf"``.
        layout: ``"signed"`` is 2^b levels without a zero; ``"magnitude"`` is a sign and 2^(b-1) magnitudes from 0 to 1,
            2^b - 1 levels in all, so that a value of 0 stays 0.
    """

    bits: int = 3
    bucket: int = 8192
    norm: str = "l2"
    layout: str = "signed"

    def __post_init__(self) -> None:
        check_choice(self.layout, "layout", LAYOUTS)
        check_bits(self.bits, "bits", 1 if self.layout == "signed" else 2, 8)
        check_bucket(self.bucket)
        check_choice(self.norm, "norm", NORMS)

    @property
    def multiplier(self) -> float | None:
        """The p of fixed exponential levels, 0 for equally spaced ones; None where the levels themselves travel."""
        return None

    def levels(self, state: State | None = None) -> torch.Tensor:
        """Return the levels as float32, strictly increasing from -1 to 1."""
        assert self.multiplier is not None
        return fixed_levels(self.bits, self.layout, self.multiplier)

    def encode(self, x: torch.Tensor, key: Noise = None, state: State | None = None) -> Payload:
        flat = flat_values(x)
        noise = noise_key(key, flat.numel())
        levels = self.levels(state).to(flat.device)
        request = Request(flat.device.type)
        norms = torch.empty(-(-flat.numel() // self.bucket), device=flat.device)
        order = NORMS[self.norm]
        codes = run("encode_buckets", request, "auto", flat, norms, levels, self.bucket, self.bits, noise, order)
        check_finite(norms)
        parts = {"codes": codes, "norms": norms}
        if self.multiplier is None:
            parts["levels"] = levels
        else:
            parts["grid"] = levels.new_tensor([self.multiplier, float(self.layout == "magnitude")])
        return Payload(codec=self.name, shape=x.shape, dtype=x.dtype, bits=self.bits, bucket=self.bucket, parts=parts)

    def decode(self, payload: Payload) -> torch.Tensor:
        return restore(decode_levels(payload, self.name), payload)

    def decode_into(self, payload: Payload, out: torch.Tensor, *, add: bool = False) -> None:
        if payload.dtype == torch.float32 and payload.device == out.device:
            decode_levels(payload, self.name, out, add)
        else:
            super().decode_into(payload, out, add=add)


def decode_levels(payload: Payload, codec: str, out: torch.Tensor | None = None, add: bool = True) -> torch.Tensor:
    """Return the flat float32 values of a payload of symbols, norms and levels, or put them into ``out``.

    Raises:
        CorruptDataError: the parts do not fit together.
    """
    count = check_payload(payload, codec, least_bits=1)
    bucket, bits = payload.bucket, payload.bits
    if bucket < 1:
        raise CorruptDataError(f"payload: bucket={bucket}; must be at least 1")
    codes = payload.part("codes", torch.uint8, symbol_bytes(bits, count))
    norms = payload.part("norms", torch.float32, -(-count // bucket))
    levels = _levels_of(payload)
    if not bool((norms >= 0).all() & torch.isfinite(norms).all()):
        raise CorruptDataError("payload: norms must be finite and at least 0")
    request = Request(codes.device.type)
    return run("decode_buckets", request, "auto", codes, norms, levels, bucket, bits, count, out, add)


def _levels_of(payload: Payload) -> torch.Tensor:
    """Return the levels that a payload holds, or those of the grid that it names."""
    if "grid" in payload.parts and "levels" not in payload.parts:
        p, zero = payload.part("grid", torch.float32, 2).tolist()
        if not 0 <= p < 1 or zero not in (0, 1) or payload.bits <= zero:
            raise CorruptDataError(f"payload: grid [{p}, {zero}] of {payload.bits} bits is not possible")
        return fixed_levels(payload.bits, LAYOUTS[int(zero)], p).to(payload.parts["grid"].device)
    count = payload.parts["levels"].numel() if "levels" in payload.parts else 2
    if not 2 <= count <= 1 << payload.bits:
        raise CorruptDataError(f"payload: {count} levels; {payload.bits} bits have 2 to {1 << payload.bits}")
    levels = payload.part("levels", torch.float32, count)
    if not bool((levels.diff() > 0).all() & (levels[0] == -1) & (levels[-1] == 1)):
        raise CorruptDataError("payload: levels must increase strictly from -1 to 1")
    return levels


def fixed_levels(bits: int, layout: str, p: float) -> torch.Tensor:
    """Return the float32 levels of a grid that does not adapt: powers of p, or equally spaced for p = 0.

    >>> fixed_levels(2, "magnitude", 0.0).tolist(), fixed_levels(2, "signed", 0.5).tolist()
    ([-1.0, 0.0, 1.0], [-1.0, -0.5, 0.5, 1.0])
    """
    magnitudes = exponential_magnitudes(bits, layout, p) if p else uniform_magnitudes(bits, layout)
    return separate(with_mirror(magnitudes, layout))


def with_mirror(magnitudes: torch.Tensor, layout: str) -> torch.Tensor:
    """Return all levels, from -1 to 1, of float64 ``magnitudes``: positive ones for ``"signed"``, else 0 included.

    >>> with_mirror(torch.tensor([0.5, 1.0], dtype=torch.float64), "signed").tolist()
    [-1.0, -0.5, 0.5, 1.0]
    >>> with_mirror(torch.tensor([0.0, 1.0], dtype=torch.float64), "magnitude").tolist()
    [-1.0, 0.0, 1.0]
    """
    negative = -magnitudes.flip(0)
    return torch.cat([negative if layout == "signed" else negative[:-1], magnitudes])


def uniform_magnitudes(bits: int, layout: str) -> torch.Tensor:
    """Return equally spaced magnitudes as float64; mirrored, the levels are equally spaced too.

    >>> uniform_magnitudes(3, "magnitude").tolist()[:2], uniform_magnitudes(2, "signed").tolist()
    ([0.0, 0.3333333333333333], [0.3333333333333333, 1.0])
    """
    half = 1 << (bits - 1)
    if layout == "magnitude":
        return torch.arange(half, dtype=torch.float64) / (half - 1)
    return (2 * torch.arange(half, dtype=torch.float64) + 1) / (2 * half - 1)


def exponential_magnitudes(bits: int, layout: str, p: float) -> torch.Tensor:
    """Return the magnitudes 1, p, p^2, ... as float64 in increasing order; for ``"magnitude"`` the least one is 0.

    >>> exponential_magnitudes(3, "signed", 0.5).tolist(), exponential_magnitudes(3, "magnitude", 0.5).tolist()
    ([0.125, 0.25, 0.5, 1.0], [0.0, 0.25, 0.5, 1.0])
    """
    half = 1 << (bits - 1)
    powers = p ** torch.arange(half - 1, -1, -1, dtype=torch.float64)
    if layout == "magnitude":
        powers[0] = 0.0
    return powers


def separate(levels: torch.Tensor) -> torch.Tensor:
    """Return float64 ``levels`` as float32, moved apart where rounding made neighbours equal; the ends stay.

    >>> separate(torch.tensor([-1.0, 1e-60, 2e-60, 1.0], dtype=torch.float64))[1:3].diff().item() > 0
    True
    """
    found = levels.float()
    if bool((found.diff() >= _GAP).all()):
        return found
    values = found.numpy().copy()
    for i in range(1, values.size - 1):
        values[i] = max(values[i], np.nextafter(values[i - 1] + _GAP, _ONE + _ONE))
    for i in range(values.size - 2, 0, -1):  # where that pushed levels beyond the end
        values[i] = min(values[i], np.nextafter(values[i + 1] - _GAP, -_ONE - _ONE))
    return torch.from_numpy(values)
