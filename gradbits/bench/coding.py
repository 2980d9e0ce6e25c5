"""What ``gradbits bench quantize`` measures: codes from values, packing, and stored activations, against a copy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from gradbits.bench.contest import Contestant, Ready, UnavailableError, Work
from gradbits.core.grain import as_grain
from gradbits.core.noise import NoiseKey
from gradbits.kernels.dispatch import Kernel, Request, kernel_table
from gradbits.kernels.quantize import CodeMap
from gradbits.quantizers.grids import Symmetric
from gradbits.quantizers.quantizer import Quantizer

COPY: dict[str, tuple[str, ...]] = {"copy": ("copy",)}
REFERENCES = {**COPY, "torch eager": ("torch eager",)}
ROWS, COLUMNS = 8192, 4096
KEY = NoiseKey.of(1)


def quantize_works(rows: int = ROWS, columns: int = COLUMNS) -> list[Work]:
    """Return what moves memory: whole quantizers (range and codes), codes alone, and packing.

    Args:
        rows, columns: of the float32 matrix; the rate counts its bytes once.
    """
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    size = f"{rows} x {columns} fp32"
    kinds = [(rounding, grain) for rounding in ("nearest", "stochastic") for grain in ("tensor", "row")]
    works = [_quantizer(x, rounding, grain, size) for rounding, grain in kinds]
    codes = CodeMap(torch.tensor([[30.0]]), -127, 127)
    for rounding, noise in (("nearest", None), ("stochastic", KEY)):
        works.append(_kernels(f"codes alone, {rounding}, {size}", x, "quantize", (x, codes, noise)))
    few = torch.randint(-8, 8, (rows * columns,), dtype=torch.int8)
    works.append(_kernels(f"pack 4 bits, {rows * columns} codes", few, "pack", (few, 4)))
    return works


def _quantizer(x: torch.Tensor, rounding: str, grain: str, size: str) -> Work:
    """Return a work with a copy, the same in plain torch operations, and ours."""
    stochastic = rounding == "stochastic"
    q = Quantizer(grid=Symmetric(), grain=as_grain(grain), rounding=rounding)
    ours = partial(q.quantize, x, noise=KEY if stochastic else None)
    eager = partial(_eager, x, stochastic, None if grain == "tensor" else 1)
    return Work(
        name=f"quantizer, {rounding}, scale per {grain}, {size}",
        contestants=(
            _copy(x),
            Contestant(name="torch eager", build=partial(_ready, eager), peak="memory"),
            Contestant(name="gradbits", build=partial(_ready, ours), peak="memory", ours=True),
        ),
        amount=float(x.nbytes),
        references=REFERENCES,
        moves=True,
    )


def _kernels(name: str, x: torch.Tensor, op: str, arguments: tuple[object, ...]) -> Work:
    """Return a work with a copy and every kernel of ``op``."""
    contestants = [_copy(x)]
    for kernel in kernel_table()[op]:
        contestants.append(
            Contestant(name=kernel.backend, build=partial(_able, kernel, arguments), peak="memory", ours=True)
        )
    return Work(
        name=name,
        contestants=tuple(contestants),
        amount=float(x.nbytes),
        references=COPY,
        moves=True,
    )


def _copy(x: torch.Tensor) -> Contestant:
    y = torch.empty_like(x)
    return Contestant(name="copy", build=partial(_ready, partial(y.copy_, x)), peak="memory")


def _eager(x: torch.Tensor, stochastic: bool, axis: int | None) -> torch.Tensor:
    """Return the codes as one would write it in torch operations."""
    largest = x.abs().amax() if axis is None else x.abs().amax(axis, keepdim=True)
    t = x * (127.0 / largest)
    if stochastic:
        t += torch.rand_like(t) - 0.5
    return t.round_().to(torch.int8)


def _ready(run: Callable[[], object]) -> Ready:
    return Ready(run=run)


def _able(kernel: Kernel, arguments: tuple[object, ...]) -> Ready:
    reason = kernel.why_not(Request("cpu"))
    if reason is not None:
        raise UnavailableError(reason)
    return Ready(run=partial(kernel.run, *arguments))
