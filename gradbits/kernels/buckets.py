r"""Buckets of a gradient to symbols and back: the reference that every faster kernel must match bit for bit.

A flat tensor is cut into consecutive buckets of B values, the last may be shorter. Bucket v has a float32 norm; with
levels :math:`l_0 < \dots < l_{L-1}`, :math:`l_0 = -1,\ l_{L-1} = 1`, each value becomes a symbol, an index into the
levels:

.. math:: r = \mathrm{clamp}(\mathrm{fl}(x \cdot \mathrm{fl}(1/\|v\|)), -1, 1), \qquad
          j = \max\{i \le L-2 : l_i \le r\}, \qquad
          p = \mathrm{fl}(\mathrm{fl}(r - l_j) \cdot \mathrm{fl}(1/\mathrm{fl}(l_{j+1} - l_j)))

          \mathrm{symbol} = j + [u < p], \qquad \hat x = \mathrm{fl}(l_\mathrm{symbol} \cdot \|v\|)

Every operation rounds to float32. The noise is :math:`u = v + 1/2`, with element i of the stream for element i of the
tensor (``gradbits.core.noise``). A bucket of norm 0 gets the symbol ``L // 2`` throughout. Symbols are packed without
gaps (``gradbits.core.packing.pack_symbols``).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gradbits.core.errors import CorruptDataError
from gradbits.core.noise import NoiseKey, noise_bits
from gradbits.core.packing import pack_symbols, unpack_symbols
from gradbits.kernels.dispatch import Kernel, Request
from gradbits.kernels.quantize import CHUNK

TINY = torch.finfo(torch.float32).tiny  # a smaller norm counts as 0: it would have no finite reciprocal
LARGEST = torch.finfo(torch.float32).max
_LANES, _PIECE = 16, 256


def sum_in_pieces(x: torch.Tensor) -> torch.Tensor:
    """Return the sum over the last axis in an order that does not depend on the machine or the number of threads.

    The axis is filled up with zeros to pieces of 256. In a piece, lane i of 16 adds elements i, i + 16, i + 32, ... one
    after the other; the lanes are then added by halves (lane i and lane i + 8, then i + 4, i + 2, i + 1). The sums of
    the pieces are added in the same way until one is left.

    Args:
        x: float64 tensor with at least one axis.

    >>> sum_in_pieces(torch.ones(2, 300, dtype=torch.float64)).tolist()
    [300.0, 300.0]
    """
    if x.shape[-1] == 0:
        return x.new_zeros(x.shape[:-1])
    while x.shape[-1] > 1:
        x = torch.nn.functional.pad(x, (0, -x.shape[-1] % _PIECE))
        rows = x.unflatten(-1, (-1, _PIECE // _LANES, _LANES))
        lanes = rows[..., 0, :].clone()
        for row in range(1, _PIECE // _LANES):
            lanes += rows[..., row, :]
        while lanes.shape[-1] > 1:
            half = lanes.shape[-1] // 2
            lanes = lanes[..., :half] + lanes[..., half:]
        x = lanes[..., 0]
    return x[..., 0]


def bucket_norms(x: torch.Tensor, bucket: int, order: float) -> torch.Tensor:
    r"""Return every bucket's :math:`\|v\|_2` (the sum in float64, see ``sum_in_pieces``) or :math:`\|v\|_\infty`.

    A norm below the smallest normal number is 0, one above the largest number is the largest number. Where a value is
    not finite, the norm of its bucket is not finite either.

    Args:
        x: flat float32 values.
        bucket: B, values per bucket.
        order: 2 or infinity.

    Returns:
        float32 tensor of shape [ceil(n / B)].

    >>> bucket_norms(torch.tensor([3.0, -4.0, 1.0]), 2, 2.0).tolist()
    [5.0, 1.0]
    """
    bucket = max(1, min(bucket, x.numel()))
    norms = torch.empty((x.numel() + bucket - 1) // bucket, dtype=torch.float32, device=x.device)
    whole = x.numel() // bucket
    step = max(1, CHUNK // bucket)
    for first in range(0, whole, step):
        last = min(first + step, whole)
        norms[first:last] = _norm(x[first * bucket : last * bucket].view(-1, bucket), order)
    if whole < norms.numel():
        norms[whole:] = _norm(x[whole * bucket :].view(1, -1), order)
    return norms


def _norm(rows: torch.Tensor, order: float) -> torch.Tensor:
    if order == 2.0:
        rows = rows.double()
        norms = sum_in_pieces(rows * rows).sqrt()
    else:
        norms = torch.linalg.vector_norm(rows, float("inf"), dim=1).double()
    norms = torch.where(norms.isfinite(), norms.clamp(max=LARGEST), norms)
    return torch.where(norms < TINY, 0.0, norms).float()


def encode_buckets(
    x: torch.Tensor,
    norms: torch.Tensor,
    levels: torch.Tensor,
    bucket: int,
    bits: int,
    noise: NoiseKey | torch.Tensor,
    order: float | None = None,
) -> torch.Tensor:
    """Return the packed symbols of ``x``, uint8 of ``symbol_bytes(bits, n)`` bytes.

    Args:
        x: flat float32 values [n], finite.
        norms: float32 [ceil(n / B)].
        levels: float32 [L], strictly increasing from -1 to 1, L from 2 to 2^bits.
        bucket: B.
        bits: bits of one symbol, 1 to 8.
        noise: a noise key, or the noise ``v`` in (-1/2, 1/2) itself, float32 [n].
        order: None where ``norms`` are given; else they are computed first, as by ``bucket_norms``, and written there.
            One call saves a pass over memory. Symbols in a bucket whose norm is not finite mean nothing.

    >>> x, levels = torch.tensor([1.0, -1.0, 0.5]), torch.tensor([-1.0, 0.0, 1.0])
    >>> encode_buckets(x, torch.ones(1), levels, 8, 2, torch.tensor([0.0, 0.0, 0.25])).tolist()
    [18]
    """
    if order is not None:
        norms.copy_(bucket_norms(x, bucket, order))
    symbols = torch.empty(x.numel(), dtype=torch.uint8, device=x.device)
    inverse = torch.where(norms > 0, norms.clamp(min=TINY).reciprocal(), 0.0)
    per_gap = (levels[1:] - levels[:-1]).reciprocal()
    middle = levels.numel() // 2
    for start, stop, index in _pieces(x.numel(), bucket):
        shape = (index.stop - index.start, -1)
        scale = inverse[index][:, None]
        r = (x[start:stop].view(shape) * scale).clamp_(-1.0, 1.0).view(-1)
        below = torch.bucketize(r, levels, out_int32=True, right=True).sub_(1).clamp_(0, levels.numel() - 2)
        r -= levels[below]
        r *= per_gap[below]
        if isinstance(noise, NoiseKey):
            u = (noise_bits(noise, start, stop - start, x.device).float() + 0.5) * 2.0**-16
        else:
            u = noise.reshape(-1)[start:stop].to(torch.float32)
        below += (u + 0.5) < r
        found = below.view(shape)
        symbols[start:stop] = torch.where(scale > 0, found, middle).to(torch.uint8).view(-1)
    return pack_symbols(symbols, bits)


def decode_buckets(
    packed: torch.Tensor,
    norms: torch.Tensor,
    levels: torch.Tensor,
    bucket: int,
    bits: int,
    count: int,
    out: torch.Tensor | None = None,
    add: bool = True,
) -> torch.Tensor:
    """Return the values of ``count`` packed symbols as float32 [n], or add them to ``out``.

    Args:
        packed: what ``encode_buckets`` returned.
        norms, levels, bucket, bits: as for ``encode_buckets``; the levels may be any finite numbers.
        count: n.
        out: float32 [n], contiguous; the values go there and it is returned.
        add: whether they are added to what ``out`` holds.

    Raises:
        CorruptDataError: a symbol that has no level; ``out`` may have been changed in part.

    >>> decode_buckets(torch.tensor([18], dtype=torch.uint8), torch.ones(1), torch.tensor([-1.0, 0, 1]), 8, 2, 3)
    tensor([ 1., -1.,  0.])
    """
    symbols = unpack_symbols(packed, bits, count)
    if levels.numel() < 1 << bits and count and int(symbols.max()) >= levels.numel():
        raise CorruptDataError(f"codes: a symbol is {int(symbols.max())}; there are {levels.numel()} levels")
    values = torch.empty(count, dtype=torch.float32, device=packed.device) if out is None else out
    for start, stop, index in _pieces(count, bucket):
        piece = levels[symbols[start:stop].int()].view(index.stop - index.start, -1) * norms[index][:, None]
        if out is not None and add:
            values[start:stop] += piece.view(-1)
        else:
            values[start:stop] = piece.view(-1)
    return values


def _pieces(count: int, bucket: int) -> Iterator[tuple[int, int, slice]]:
    """Yield (start, stop, buckets) of pieces of about ``CHUNK`` elements: whole buckets, or a part of one."""
    bucket = max(1, min(bucket, count))
    whole = count // bucket * bucket
    if bucket <= CHUNK:
        step = CHUNK // bucket * bucket
        for start in range(0, whole, step):
            stop = min(start + step, whole)
            yield start, stop, slice(start // bucket, stop // bucket)
        if whole < count:
            yield whole, count, slice(whole // bucket, whole // bucket + 1)
        return
    for first in range(0, count, bucket):
        index = slice(first // bucket, first // bucket + 1)
        end = min(first + bucket, count)
        for start in range(first, end, CHUNK):
            yield start, min(start + CHUNK, end), index


def kernels() -> tuple[Kernel, ...]:
    """Return the kernels of this backend."""

    def always(request: Request) -> str | None:
        return None

    functions = (bucket_norms, encode_buckets, decode_buckets, pack_symbols, unpack_symbols)
    return tuple(Kernel(f.__name__, "torch", f, always) for f in functions)
