"""Products whose parts leave float32: they are added in float64, and only their sum is infinite where it must be."""

from __future__ import annotations

from dataclasses import replace

import torch

from gradbits.core.qtensor import QTensor, Rotation

LARGEST = torch.finfo(torch.float32).max
TERMS = 2.0**31  # more than one sum has


def beyond_float32(a: QTensor, b: QTensor) -> bool:
    """Return whether a part of the product of ``a`` and ``b`` may leave float32, by an upper bound of their values.

    Parts are the terms of zero points, digits, and rows that a rotation mixes: Inf less Inf would be NaN where their
    sum is finite or infinite. Scales that are NaN count as such.

    >>> q = QTensor(codes=torch.ones(1, 1, dtype=torch.int8), scale=torch.full((1, 1), 1e20), bits=8,
    ...             shape=torch.Size([1, 1]))
    >>> beyond_float32(q, q)
    True
    """
    largest = TERMS
    for q in (a, b):
        if not q.scale.numel():
            return False
        # the code of zero is a code: s Z is no larger than another value; an offset may be
        value = float(q.scale.max()) * (2 << q.bits)
        largest *= value if q.offset is None else value + float(q.offset.abs().max())
    return not largest <= LARGEST


def wide(q: QTensor) -> QTensor:
    """Return ``q`` with scale and zero point in float64, in which no product of two float32 numbers overflows."""
    return replace(
        q,
        scale=q.scale.double(),
        zero_point=None if q.zero_point is None else q.zero_point.double(),
        offset=None if q.offset is None else q.offset.double(),
        rest=None if q.rest is None else wide(q.rest),
    )


def turned_back(rotation: Rotation, total: torch.Tensor) -> torch.Tensor:
    """Undo a rotation, which is computed in float32, on float64 values that may be too large for it."""
    if not total.numel():
        return rotation.inverse(total)
    size = torch.nan_to_num(total.abs(), nan=0.0, posinf=0.0).max().clamp(min=1.0)
    return rotation.inverse(total / size).double() * size
