"""What this machine can do at best, measured: products per second by precision, and bytes moved per second."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from gradbits.kernels.dispatch import Epilogue, Request, choose

SIDE = 2048  # of the square matrices that are multiplied
COPY = 1 << 25  # floats that are copied: far more than caches hold


def roofline(clock: Callable[[], float] = time.perf_counter, repeats: int = 5, side: int = SIDE) -> dict[str, float]:
    """Return the machine's limits: operations a second in fp32, bf16 and int8, and bytes a second of a copy.

    Each is the fastest of several large runs on as many threads as PyTorch has, by each library that computes it; a
    multiplication and an addition count as two operations, a copied byte as read and written.

    Args:
        clock: returns seconds.
        repeats: runs of each; the fastest counts.
        side: of the matrices.

    >>> sorted(roofline(repeats=1, side=64))
    ['bf16', 'fp32', 'int8', 'memory']
    """
    generator = torch.Generator().manual_seed(0)
    floats = torch.randn(2, side, side, generator=generator)
    halves = floats.bfloat16()
    codes = torch.randint(-127, 128, (2, side, side), generator=generator, dtype=torch.int8)
    plain = Epilogue(torch.ones(()))
    product = choose("matmul", Request("cpu", terms=side))
    big = min(COPY, side * side * 8)
    source, target = torch.ones(big), torch.ones(big)
    runs: dict[str, tuple[float, tuple[Callable[[], object], ...]]] = {
        "fp32": (2.0 * side**3, _ways(floats)),
        "bf16": (2.0 * side**3, _ways(halves)),
        "int8": (
            2.0 * side**3,
            (lambda: torch._int_mm(codes[0], codes[1]), lambda: product.run(codes[0], codes[1], plain)),
        ),
        "memory": (2.0 * source.nbytes, (lambda: target.copy_(source),)),
    }
    return {name: amount / min(_fastest(run, clock, repeats) for run in ways) for name, (amount, ways) in runs.items()}


def _ways(pair: torch.Tensor) -> tuple[Callable[[], object], ...]:
    """Return a product of two matrices and the same as a convolution: PyTorch computes them by different libraries."""
    a, b = pair
    image, weight = a.t()[None, :, None].to(memory_format=torch.channels_last), b.t()[..., None, None].contiguous()
    return (lambda: a @ b, lambda: torch.nn.functional.conv2d(image, weight))


def _fastest(run: Callable[[], object], clock: Callable[[], float], repeats: int) -> float:
    """Return the seconds of the fastest run after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        started = clock()
        run()
        times.append(clock() - started)
    return max(min(times), 1e-9)
