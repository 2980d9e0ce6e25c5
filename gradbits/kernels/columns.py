"""Sums of the columns of a matrix in an order that does not depend on threads or backend: gradients of biases."""

from __future__ import annotations

import torch

from gradbits.kernels.dispatch import Kernel, Request

ROWS = 64  # that are added one after the other


def column_sums(rows: torch.Tensor, widest: torch.Tensor | None = None) -> torch.Tensor:
    """Return the sums of the columns of ``rows`` [N, C] in float32, shape [C].

    Every 64 rows are added one after the other; their sums are rows of a matrix that is summed the same way.

    Args:
        rows: floating-point values, contiguous; computed in float32.
        widest: float32 of one element that receives the largest magnitude of ``rows``, NaN if there is one; or None.

    >>> widest = torch.empty(())
    >>> column_sums(torch.tensor([[1.0, 2.0], [3.0, -5.0]]), widest).tolist(), widest.item()
    ([4.0, -3.0], 5.0)
    """
    if widest is not None:
        widest.copy_(torch.stack(torch.aminmax(rows)).abs().max() if rows.numel() else widest.new_zeros(()))
    sums = rows.float()
    if not len(sums):
        return sums.new_zeros(sums.shape[1])
    while len(sums) > 1:
        whole = len(sums) // ROWS
        parts = [_added(sums[: whole * ROWS].view(whole, ROWS, -1))] if whole else []
        if len(sums) % ROWS:
            parts.append(_added(sums[whole * ROWS :].unsqueeze(0)))
        sums = parts[0] if len(parts) == 1 else torch.cat(parts)
    return sums[0].clone() if sums.data_ptr() == rows.data_ptr() else sums[0]


def _added(blocks: torch.Tensor) -> torch.Tensor:
    """Return the sums of ``blocks`` [count, rows, C] over their rows, from the first to the last."""
    total = blocks[:, 0].clone()
    for i in range(1, blocks.shape[1]):
        total += blocks[:, i]
    return total


def kernels() -> tuple[Kernel, ...]:
    """Return the kernels of this backend."""

    def always(request: Request) -> str | None:
        return None

    return (Kernel("column_sums", "torch", column_sums, always),)
