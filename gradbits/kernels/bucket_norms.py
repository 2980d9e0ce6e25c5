r"""Norms of buckets: the reference that a faster kernel matches bit for bit, so the order of the sum is part of it.

.. math:: \|x_b\|_\infty = \max_i |x_i|, \qquad
          \|x_b\|_2 = \mathrm{fl}_{32}\Bigl(\sqrt{\textstyle\sum_i x_i^2}\Bigr)

A square of a float32 is exact in float64 and cannot overflow there. Element i of a bucket goes to lane i mod 32; every
lane adds up in order of i, then lanes j and j + 16, j + 8, j + 4, j + 2, j + 1 are added. Missing elements are zeros.
"""

from __future__ import annotations

import torch

from gradbits.core.checks import check_choice, check_integer

LANES = 32
NORMS = ("max", "l2")


def bucket_norms(x: torch.Tensor, bucket: int, norm: str = "max") -> torch.Tensor:
    """Return the float32 norm of every bucket of ``bucket`` consecutive elements of ``x``; the last may be short.

    Args:
        x: floating-point values of any shape, taken in row-major order; computed from their float32 values.
        bucket: elements that share one norm.
        norm: ``max`` or ``l2``. NaN gives NaN.

    >>> bucket_norms(torch.tensor([3.0, -4.0, 2.0]), 2, "l2").tolist()
    [5.0, 2.0]
    """
    check_integer(bucket, "bucket", 1)
    check_choice(norm, "norm", NORMS)
    flat = x.detach().reshape(-1).to(torch.float32)
    count = -(-flat.numel() // bucket)
    missing = count * bucket - flat.numel()
    if missing:
        flat = torch.cat([flat, flat.new_zeros(missing)])
    rows = flat.view(count, bucket)
    if norm == "max":
        # as integers, magnitudes are in the order of the floats, with NaN above all: one maximum on every backend
        return (rows.view(torch.int32) & 0x7FFFFFFF).amax(1).view(torch.float32) if count else flat
    lanes = rows.new_zeros(count, LANES, dtype=torch.float64)
    for start in range(0, bucket, LANES):
        part = rows[:, start : start + LANES].double()
        lanes[:, : part.shape[1]] += part * part
    while lanes.shape[1] > 1:
        lanes = lanes[:, : lanes.shape[1] // 2] + lanes[:, lanes.shape[1] // 2 :]
    return lanes[:, 0].sqrt().to(torch.float32)
