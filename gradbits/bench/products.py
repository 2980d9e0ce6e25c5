"""What ``gradbits bench gemm`` and ``conv`` measure: the three products, codes given, epilogue included."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from gradbits.bench.contest import Contestant, Ready, UnavailableError, Work
from gradbits.kernels.dispatch import Epilogue, Kernel, Request, kernel_table
from gradbits.kernels.geometry import ConvGeometry, patch_bytes, terms_of

REFERENCES: dict[str, tuple[str, ...]] = {"fp32": ("fp32",), "bf16": ("bf16",)}
GEMMS = ((8192, 1024, 1024), (2048, 512, 512), (2048, 512, 2048), (512, 784, 256))  # rows, features in, features out
CONVS = (  # channels in, channels out, kernel, stride, image side
    (64, 64, 3, 1, 32),
    (64, 128, 3, 2, 32),
    (128, 128, 3, 1, 16),
    (256, 256, 3, 1, 8),
    (512, 512, 3, 1, 4),
    (16, 16, 3, 1, 32),
    (3, 64, 3, 1, 32),
)
PRODUCTS = ("output", "grad_input", "grad_weight")
SIMULATED = 1 << 33  # operations beyond which the float64 oracle is left out: it is no competitor

Run = Callable[[], torch.Tensor]


def gemm_works(shapes: tuple[tuple[int, int, int], ...] = GEMMS) -> list[Work]:
    """Return the three products of linear layers.

    Args:
        shapes: (rows, features in, features out) of each layer.
    """
    return [_gemm(*shape, product) for shape in shapes for product in PRODUCTS]


def conv_works(shapes: tuple[tuple[int, int, int, int, int], ...] = CONVS, batch: int = 128) -> list[Work]:
    """Return the three products of convolutions with channels last.

    Args:
        shapes: (channels in, channels out, kernel, stride, image side) of each layer.
        batch: images.
    """
    return [_conv(*shape, batch, product) for shape in shapes for product in PRODUCTS]


def _gemm(rows: int, wide: int, out: int, product: str) -> Work:
    x, w, g = _codes(rows, wide), _codes(out, wide), _codes(rows, out)
    a, b = {"output": (x, w.t()), "grad_input": (g, w), "grad_weight": (g.t(), x)}[product]
    request = Request("cpu", terms=a.shape[1])
    epilogue = Epilogue(torch.tensor([[1e-4]]))
    floats = {dtype: (a.to(dtype), b.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}

    def in_float(dtype: torch.dtype) -> torch.Tensor:
        left, right = floats[dtype]
        return left @ right

    def integer(kernel: Kernel) -> torch.Tensor:
        return kernel.run(a, b, epilogue)

    name = f"gemm {product}, {rows} x {wide} -> {out}"
    return _work(name, 2.0 * rows * wide * out, "matmul", request, in_float, integer)


def _conv(ci: int, co: int, kernel: int, stride: int, side: int, batch: int, product: str) -> Work:
    g = ConvGeometry((stride, stride), (kernel // 2,) * 2, (1, 1), 1, (side, side), (kernel, kernel))
    x, w, grad = _codes(batch, ci, side, side), _codes(co, ci, kernel, kernel), _codes(batch, co, *g.output_size)
    op = f"conv_{product}"
    a, b = {"output": (x, w), "grad_input": (grad, w), "grad_weight": (grad, x)}[product]
    request = Request("cpu", terms_of(op, g, batch, b.shape), 2)
    if product != "grad_weight":
        request = replace(request, patch_bytes=patch_bytes(op, g, batch, b.shape))
    epilogue = Epilogue(torch.full((1, 1, 1, 1), 1e-4))
    floats = {dtype: tuple(t.to(dtype) for t in (x, w, grad)) for dtype in (torch.float32, torch.bfloat16)}

    def in_float(dtype: torch.dtype) -> torch.Tensor:
        fx, fw, fg = floats[dtype]
        if product == "output":
            return torch.conv2d(fx, fw, None, g.stride, g.padding)
        mask = (product == "grad_input", product == "grad_weight", False)
        parts = torch.ops.aten.convolution_backward(
            fg, fx, fw, None, g.stride, g.padding, g.dilation, False, (0, 0), 1, mask
        )
        found: torch.Tensor = parts[0] if product == "grad_input" else parts[1]
        return found

    def integer(run: Kernel) -> torch.Tensor:
        return run.run(a, b, g, epilogue)

    amount = 2.0 * batch * co * ci * kernel**2 * math.prod(g.output_size)
    name = f"conv {product}, {kernel} x {kernel} / {stride}, {ci} -> {co}, {side} x {side}, batch {batch}"
    return _work(name, amount, op, request, in_float, integer)


def _work(
    name: str,
    amount: float,
    op: str,
    request: Request,
    in_float: Callable[[torch.dtype], torch.Tensor],
    integer: Callable[[Kernel], torch.Tensor],
) -> Work:
    """Return a work with fp32, bf16 and every kernel of ``op``."""
    contestants = [
        _contestant("fp32", partial(in_float, torch.float32), "fp32"),
        _contestant("bf16", partial(in_float, torch.bfloat16), "bf16"),
    ]
    for kernel in kernel_table()[op]:
        if kernel.backend == "simulate" and amount > SIMULATED:
            continue
        contestants.append(
            Contestant(
                name=f"int8 {kernel.backend}",
                build=partial(_able, kernel, request, partial(integer, kernel)),
                peak="int8",
                ours=True,
            )
        )
    return Work(name=name, contestants=tuple(contestants), amount=amount, references=REFERENCES)


def _able(kernel: Kernel, request: Request, run: Run) -> Ready:
    """Return a kernel that can start.

    Raises:
        UnavailableError: the kernel cannot, or should not, run such a request.
    """
    reason = kernel.why_not(request)
    if reason is not None:
        raise UnavailableError(reason)
    return Ready(run=run)


def _contestant(name: str, run: Run, peak: str) -> Contestant:
    return Contestant(name=name, build=lambda: Ready(run=run), peak=peak)


def _codes(*shape: int) -> torch.Tensor:
    """Return random codes; images with channels last."""
    found = torch.randint(-127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(len(shape)))
    return found.to(memory_format=torch.channels_last) if len(shape) == 4 else found
