"""One dispatcher: which backend runs an operation, and why not another.

An operation (``quantize``, ``matmul``, ``conv_output``, ...) has kernels of several backends that give the same bits.
A backend is a module with a function ``kernels()``; adding one means adding its name to ``BACKENDS``, callers stay as
they are. The first kernel in that order that supports a request runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch

from gradbits.core.checks import check_choice
from gradbits.core.errors import FallbackError
from gradbits.kernels.activations import activate

BACKENDS = (
    "gradbits.kernels.native",
    "gradbits.kernels.onednn",
    "gradbits.kernels.quantize",
    "gradbits.kernels.attention",
    "gradbits.kernels.coding",
    "gradbits.kernels.columns",
    "gradbits.kernels.buckets",
    "gradbits.kernels.huffman_symbols",
    "gradbits.kernels.reference",
    "gradbits.kernels.simulate",
)
COMPUTE = ("auto", "integer", "simulate")
INT32_TERMS = 131_071  # products of two int8 codes (down to -128) that a sum in int32 surely holds


@dataclass(frozen=True)
class Request:
    """What a kernel must know to say whether it can run: the device and the sizes of the product.

    Args:
        device: type of the operands' device.
        terms: number of products in one sum.
        spatial: number of spatial dimensions of a convolution, 0 for a matrix product.
        groups: groups of a convolution.
        patch_bytes: bytes of all patches of a convolution, per stride-1 convolution that it is made of.
    """

    device: str
    terms: int = 0
    spatial: int = 0
    groups: int = 1
    patch_bytes: int | None = None


@dataclass(frozen=True)
class Kernel:
    """One implementation of one operation.

    Args:
        op: the operation.
        backend: short name of the backend, shown in reports.
        run: the implementation.
        why_not: returns None where the kernel can run a request, else the reason.
    """

    op: str
    backend: str
    run: Callable[..., Any]
    why_not: Callable[[Request], str | None]


@dataclass(frozen=True)
class Epilogue:
    r"""What follows the exact integer sum, the same for every backend.

    .. math:: y = f\big(\mathrm{fl}_{32}(\textstyle\sum q_a q_b)\cdot s + t_1 + t_2 + \dots + b\big)

    Every operation rounds once to float32, in this order; the cast to ``dtype`` is last.

    Args:
        scale: float32 ``s``, broadcastable to the output.
        terms: what the zero points add, each broadcastable to the output.
        bias: broadcastable to the output, or None.
        dtype: dtype of the result.
        activation: ``f``, one of ``gradbits.kernels.activations.ACTIVATIONS``; the empty one is none.
    """

    scale: torch.Tensor
    terms: tuple[torch.Tensor, ...] = ()
    bias: torch.Tensor | None = None
    dtype: torch.dtype = torch.float32
    activation: str = ""

    def apply_(self, total: torch.Tensor) -> torch.Tensor:
        """Return the output for the exact integer ``total`` (any dtype that holds it); may reuse its memory."""
        y = total.to(torch.float32)
        y *= self.scale
        for term in self.terms:
            y += term
        if self.bias is not None:
            y += self.bias.to(torch.float32)
        return activate(y, self.activation).to(self.dtype)


@lru_cache(maxsize=1)
def kernel_table() -> dict[str, tuple[Kernel, ...]]:
    """Return every operation's kernels, preferred ones first."""
    table: dict[str, tuple[Kernel, ...]] = {}
    for backend in BACKENDS:
        for kernel in import_module(backend).kernels():
            table[kernel.op] = (*table.get(kernel.op, ()), kernel)
    return table


@lru_cache(maxsize=4096)
def choose(op: str, request: Request, compute: str = "auto") -> Kernel:
    """Return the kernel that runs ``op`` for ``request``.

    ``simulate`` multiplies the codes in float64; ``integer`` never does; ``auto`` takes the first that can. All give
    the same bits.

    Raises:
        ArgumentError: ``compute`` is none of the three.
        FallbackError: no kernel can run the request; every kernel's reason is listed.

    >>> choose("matmul", Request("cpu", terms=64), "simulate").backend
    'simulate'
    """
    check_choice(compute, "compute", COMPUTE)
    reasons = []
    for kernel in kernel_table().get(op, ()):
        if compute != "auto" and (kernel.backend == "simulate") != (compute == "simulate"):
            continue
        reason = kernel.why_not(request)
        if reason is None:
            return kernel
        reasons.append(f"{kernel.backend}: {reason}")
    raise FallbackError(f"no kernel runs {op!r} with compute={compute!r}: {'; '.join(reasons) or 'unknown operation'}")


def explain(op: str, request: Request) -> list[tuple[str, str]]:
    """Return (backend, reason) for every kernel of ``op``; the reason is empty where the kernel can run."""
    return [(k.backend, k.why_not(request) or "") for k in kernel_table()[op]]


def run(op: str, request: Request, compute: str, *args: Any) -> Any:
    """Choose a kernel for ``op`` and run it."""
    return choose(op, request, compute).run(*args)
