"""Products of codes with ones, which zero points need: sums over channels, samples or positions, never multiplied."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from gradbits.kernels.dispatch import Request, run
from gradbits.kernels.geometry import ConvGeometry

MOST = 1 << 24  # codes whose sum surely fits in int32


def _taps(geometry: ConvGeometry) -> Iterator[tuple[Any, Any, Any]]:
    """Yield, as indices, each tap of the kernel, the outputs it takes part in and the inputs it meets there."""
    g = geometry
    per_dim = []
    for n, o, k, s, p, d in zip(
        g.input_size, g.output_size, g.kernel_size, g.stride, g.padding, g.dilation, strict=True
    ):
        choices = []
        for tap in range(k):
            shift = tap * d - p  # output j meets input s j + shift
            first, last = max(0, -(shift // s)), min(o - 1, (n - 1 - shift) // s)
            count = last - first + 1
            if count > 0:
                start = first * s + shift
                choices.append((tap, slice(first, last + 1), slice(start, start + (count - 1) * s + 1, s)))
        per_dim.append(choices)
    for combination in product(*per_dim):
        yield tuple((..., *each) for each in zip(*combination, strict=True))  # type: ignore[misc]


def conv_with_ones(op: str, role: str, codes: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
    """Return the convolution product ``op`` of ``codes`` with ones for the other operand, in float32.

    Args:
        op: ``"conv_output"``, ``"conv_grad_input"`` or ``"conv_grad_weight"``.
        role: what ``codes`` are: ``"input"`` [N, Ci, *] or ``"gradient"`` [N, Co, *].
        codes: int8; at most ``MOST`` of them in one sum.
        geometry: of the convolution, with one group.

    Returns:
        [N, 1, *] for the first two; [1, Ci, *kernel] or [Co, 1, *kernel] for the last.

    >>> g = ConvGeometry((1,), (1,), (1,), 1, (3,), (3,))
    >>> conv_with_ones("conv_output", "input", torch.tensor([[[1, 2, 3]]], dtype=torch.int8), g).tolist()
    [[[3.0, 6.0, 5.0]]]
    """
    by_gradient = role == "gradient"
    request, device = Request(codes.device.type), codes.device
    if op == "conv_grad_weight":
        sums = run("sum_codes", request, "auto", codes, 0)
        result = torch.zeros(1, codes.shape[1], *geometry.kernel_size, dtype=torch.int64, device=device)
        for taps, outputs, inputs in _taps(geometry):
            result[taps] = sums[outputs if by_gradient else inputs].flatten(2).sum(2)
        return (result.transpose(0, 1) if by_gradient else result).float()
    sums = run("sum_codes", request, "auto", codes, 1)
    size = geometry.input_size if by_gradient else geometry.output_size
    result = torch.zeros(codes.shape[0], 1, *size, dtype=torch.int32, device=device)
    for _, outputs, inputs in _taps(geometry):
        to, of = (inputs, outputs) if by_gradient else (outputs, inputs)
        result[to] += sums[of]
    return result.float()
