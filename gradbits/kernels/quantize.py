r"""Codes from values: the reference that every faster quantizer must match bit for bit.

.. math:: t = \mathrm{fl}(\mathrm{fl}(x - a)\cdot r), \qquad
          q = \mathrm{clamp}(\mathrm{round}(t + v) + z,\ q_\min,\ q_\max)

with the reciprocal scale r, the shift a (0 where zero is exact), the rounding noise v (0 for nearest; round is half to
even) and the integer z. Every operation rounds to float32. Element i of the noise belongs to element i in memory order,
so a channels-last tensor needs no copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gradbits.core.noise import NoiseKey, noise_bits
from gradbits.kernels.dispatch import Kernel, Request

CHUNK = 1 << 17  # elements that stay in the cache through all passes


@dataclass(frozen=True)
class CodeMap:
    """How values map to codes; tensors broadcast against the values and vary along at most one axis.

    Args:
        inverse: float32 reciprocal ``r`` of the scale.
        low, high: the legal codes ``q_min`` and ``q_max``, within int8.
        shift: float32 ``a``, or None for 0.
        zero: float32 integers ``z``, or None for 0.
    """

    inverse: torch.Tensor
    low: int
    high: int
    shift: torch.Tensor | None = None
    zero: torch.Tensor | None = None


Noise = NoiseKey | torch.Tensor | None


TINY = torch.finfo(torch.float32).tiny  # a smaller scale would have no finite reciprocal


def place_step(width: torch.Tensor, steps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and reciprocal for ``steps`` steps over ``width``: 0 and 0 where the width is 0."""
    scale = torch.where(width > 0, (width / steps).clamp(min=TINY), width)
    scale = scale + (width - width)  # adds 0, or NaN where the width is not finite
    return scale, torch.nan_to_num(scale.reciprocal(), nan=0.0, posinf=0.0)


def memory_order(x: torch.Tensor) -> tuple[int, ...] | None:
    """Return the permutation of axes under which ``x`` is contiguous, or None where there is none."""
    strides = x.stride()
    order = tuple(sorted(range(x.dim()), key=lambda axis: -strides[axis]))
    return order if x.permute(order).is_contiguous() else None


def quantize(x: torch.Tensor, code_map: CodeMap, noise: Noise = None) -> torch.Tensor:
    """Return int8 codes of ``x`` in its shape and memory order.

    Args:
        x: floating-point values of any shape; computed in float32.
        code_map: how values map to codes.
        noise: a noise key for stochastic rounding, the noise ``v`` itself in the shape of ``x``, or None for nearest.

    >>> x = torch.tensor([-1.0, 0.26, 9.0])
    >>> quantize(x, CodeMap(torch.tensor([4.0]), -7, 7)).tolist()
    [-4, 1, 7]
    """
    order = memory_order(x)
    if order is None:
        x, order = x.contiguous(), tuple(range(x.dim()))
    rows = x.permute(order)
    codes = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    varying = [p for p in (code_map.inverse, code_map.shift, code_map.zero) if p is not None and p.numel() > 1]
    axis = 0
    if varying and rows.dim():
        p = varying[0].permute(order) if varying[0].dim() == x.dim() else varying[0]
        axis = next((i for i, n in enumerate(p.shape) if n > 1), 0)
    count = max((p.numel() for p in varying), default=1)
    if x.numel():
        outer = rows.shape[:axis].numel() if count > 1 else 1
        view = rows.reshape(outer, count, -1)
        key, explicit = (noise, None) if isinstance(noise, NoiseKey) else (None, noise)
        if explicit is not None:
            explicit = explicit.to(torch.float32).permute(order).reshape(view.shape)
        _fill_(codes.view(view.shape), view, code_map, key, explicit)
    inverse_order = sorted(range(x.dim()), key=lambda i: order[i])
    return codes.permute(inverse_order)


def quantize_symmetric(
    x: torch.Tensor, largest: int, noise: Noise, found: torch.Tensor, width: torch.Tensor | None = None
) -> torch.Tensor:
    """Return int8 codes of ``x`` on one symmetric scale for its largest magnitude c, s = c / ``largest``.

    Args:
        x: floating-point values of any shape, not empty.
        largest: the highest code.
        noise: as for ``quantize``.
        found: float32 of three elements, receives s, -c and c; s is NaN where ``x`` is not finite.
        width: float32 c of one element, where it is known.

    >>> found = torch.empty(3)
    >>> quantize_symmetric(torch.tensor([-14.0, 3.1]), 7, None, found).tolist(), found.tolist()
    ([-7, 2], [2.0, -14.0, 14.0])
    """
    if width is None:
        low, high = torch.stack(torch.aminmax(x)).float()
        width = torch.maximum(-low, high)
    width = width.reshape(())
    scale, inverse = place_step(width, largest)
    torch.stack([scale, -width, width], out=found.view(3))
    return quantize(x, CodeMap(inverse, -largest, largest), noise)


def _pieces(shape: torch.Size, whole: bool) -> Iterator[tuple[slice, slice, slice]]:
    """Yield pieces of a [outer, count, inner] tensor that are contiguous and about ``CHUNK`` elements large."""
    outer, count, inner = shape
    full = slice(None)
    if whole or outer * count * inner <= CHUNK:
        yield full, full, full
    elif count * inner <= CHUNK:
        step = CHUNK // (count * inner)
        yield from ((slice(i, i + step), full, full) for i in range(0, outer, step))
    elif inner <= CHUNK:
        step = CHUNK // inner
        for o in range(outer):
            yield from ((slice(o, o + 1), slice(i, i + step), full) for i in range(0, count, step))
    else:
        for o in range(outer):
            for c in range(count):
                for i in range(0, inner, CHUNK):
                    yield slice(o, o + 1), slice(c, c + 1), slice(i, i + CHUNK)


def _fill_(
    codes: torch.Tensor, x: torch.Tensor, m: CodeMap, key: NoiseKey | None, explicit: torch.Tensor | None
) -> None:
    """Quantize ``x`` [outer, count, inner] into ``codes`` piece by piece."""
    _, count, inner = x.shape
    on_cpu = x.device.type == "cpu"
    largest = min(x.numel(), CHUNK) if on_cpu else x.numel()
    work = torch.empty(largest, dtype=torch.float32, device=x.device)
    rounding = torch.empty_like(work) if key is not None else None
    scratch = (
        torch.empty(2, largest // 2 + 1, dtype=torch.int32, device=x.device) if key is not None else None
    )

    def parameter(p: torch.Tensor, columns: slice) -> torch.Tensor | float:
        if p.numel() == 1:  # on the processor a number is faster than a broadcast tensor
            return float(p) if on_cpu else p.reshape(1, 1, 1)
        return p.reshape(1, -1, 1)[:, columns]

    for where in _pieces(x.shape, whole=not on_cpu):
        piece = x[where]
        t = work[: piece.numel()].view(piece.shape)
        inverse = parameter(m.inverse, where[1])
        if m.shift is None and piece.dtype == torch.float32:
            torch.mul(piece, inverse, out=t)
        else:
            t.copy_(piece)
            if m.shift is not None:
                t -= parameter(m.shift, where[1])
            t *= inverse
        if key is not None and rounding is not None:
            start = ((where[0].start or 0) * count + (where[1].start or 0)) * inner + (where[2].start or 0)
            v = rounding[: piece.numel()]
            torch.add(noise_bits(key, start, piece.numel(), x.device, scratch), 0.5, out=v)
            v *= 2.0**-16
            t += v.view(piece.shape)
        elif explicit is not None:
            t += explicit[where]
        t.round_()
        if m.zero is not None:
            t += parameter(m.zero, where[1])
        codes[where] = t.clamp_(m.low, m.high).to(torch.int8)


def kernels() -> tuple[Kernel, ...]:
    """Return the kernels of this backend."""

    def always(request: Request) -> str | None:
        return None

    return tuple(Kernel(f.__name__, "torch", f, always) for f in (quantize, quantize_symmetric))
