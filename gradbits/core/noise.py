"""The one noise function: counter-based bits from (seed, stream, element index).

A quantizer that rounds stochastically draws one 64-bit seed per layer call from PyTorch's default CPU generator, so
``torch.manual_seed`` governs it and restoring the generator's state restores the noise. From the seed on, bits are a
pure function of (seed, stream, element index): the same for every backend and every number of threads. Different uses
of one tensor take different streams.

Word ``i`` of a stream is a 32-bit hash with two 32-bit keys; it gives elements ``2i`` (low half) and ``2i+1`` (high
half) 16 bits each. With ``k`` those bits read as a signed integer, an element's noise is ``v = (k + 1/2) / 2^16``,
which lies inside (-1/2, 1/2), is symmetric about 0 and is exact in float32; stochastic rounding is ``round(t + v)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_MASK64 = (1 << 64) - 1
_C1, _C2 = 0x7FEB352D, 0x846CA68B  # multipliers of a well-tested 32-bit integer hash


def _splitmix64(x: int) -> int:
    """Mix 64 bits: neighbouring seeds and streams get unrelated keys."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _signed32(x: int) -> int:
    return x - (1 << 32) if x >= 1 << 31 else x


@dataclass(frozen=True)
class NoiseKey:
    """The two hash keys of one noise stream; ``k0`` and ``k1`` are signed 32-bit integers."""

    k0: int
    k1: int

    @staticmethod
    def of(seed: int, stream: int = 0) -> NoiseKey:
        """Return the key of stream ``stream`` under ``seed``; any Python integers are legal.

        >>> NoiseKey.of(1, 2) == NoiseKey.of(1, 2), NoiseKey.of(1, 2) == NoiseKey.of(1, 3)
        (True, False)
        """
        mixed = _splitmix64(_splitmix64(seed & _MASK64) ^ (stream & _MASK64))
        return NoiseKey(_signed32(mixed & 0xFFFFFFFF), _signed32(mixed >> 32))


def draw_seed() -> int:
    """Draw a 63-bit seed from PyTorch's default CPU generator.

    >>> _ = torch.manual_seed(0); a = draw_seed(); _ = torch.manual_seed(0); a == draw_seed()
    True
    """
    return int(torch.randint(0, (1 << 63) - 1, (), dtype=torch.int64).item())


def noise_bits(
    key: NoiseKey, start: int, count: int, device: torch.device | str = "cpu", scratch: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the noise bits ``k`` of elements ``start`` to ``start + count - 1`` as int16.

    Args:
        key: which stream.
        start: index of the first element in the stream.
        count: number of elements.
        device: where to compute.
        scratch: optional int32 work space of shape [2, at least count // 2 + 1], reused between calls: fresh large
            buffers cost more than the hash.

    >>> key = NoiseKey.of(7)
    >>> bool((noise_bits(key, 0, 100)[31:40] == noise_bits(key, 31, 9)).all())
    True
    """
    first, last = start // 2, (start + count + 1) // 2
    words = last - first
    if scratch is None:
        scratch = torch.empty(2, max(words, 1), dtype=torch.int32, device=device)
    x, shifted = scratch[0, :words], scratch[1, :words]
    # word indices beyond 32 bits wrap by design: a stream is good for 2^33 elements
    torch.arange(words, dtype=torch.int32, device=device, out=x)
    x += _signed32((first + key.k0) & 0xFFFFFFFF)
    for shift, multiplier, add in ((16, _C1, 0), (15, _C2, key.k1), (16, 0, 0)):
        # int32 shifts are arithmetic; the mask makes them logical
        torch.bitwise_right_shift(x, shift, out=shifted)
        shifted &= (1 << (32 - shift)) - 1
        x ^= shifted
        if add:
            x += add
        if multiplier:
            x *= _signed32(multiplier)
    return x.view(torch.int16)[start % 2 : start % 2 + count]


def uniform_noise(key: NoiseKey, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the rounding noise ``v`` in (-1/2, 1/2) of the first ``count`` elements as float32.

    >>> v = uniform_noise(NoiseKey.of(0), 1000)
    >>> bool((v.abs() < 0.5).all()), abs(float(v.mean())) < 0.05
    (True, True)
    """
    return (noise_bits(key, 0, count, device).float() + 0.5) * 2.0**-16
