"""Integer products on any device with torch operations: int8 codes, int32 sums, contractions split before overflow."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from gradbits.kernels.dispatch import INT32_TERMS, Epilogue, Kernel, Request
from gradbits.kernels.geometry import (
    ConvGeometry,
    channels_first,
    channels_last,
    grad_input_phases,
    in_result_order,
    pad_spatial,
    patches,
    phase_weight,
    result_is_last,
)

PATCH_BYTES = 1 << 21  # patches of a convolution are built in pieces that stay in the cache
GROUP_CHANNELS = 32  # input channels of the groups that are worked on at once


@lru_cache(maxsize=8)
def int_mm_is_exact(device: str) -> bool:
    """Whether ``torch._int_mm`` survives the worst case: processors without int8 dot products may saturate."""
    try:
        a = torch.full((32, 64), 127, dtype=torch.int8, device=device)
        b = torch.full((64, 32), 127, dtype=torch.int8, device=device)
        b[:, ::2] = -127
        return torch.equal(torch._int_mm(a, b).cpu(), (a.cpu().int() @ b.cpu().int()))
    except (RuntimeError, NotImplementedError):
        return False


def int_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the exact integer product of int8 ``a`` [M, K] and ``b`` [K, N]: int32 where it fits, else int64.

    >>> a = torch.full((1, 200_000), 127, dtype=torch.int8)
    >>> int_product(a, a.t()).item() == 127 * 127 * 200_000
    True
    """
    m, k, n = a.shape[0], a.shape[1], b.shape[1]
    if 0 in (m, k, n):
        return torch.zeros(m, n, dtype=torch.int32, device=a.device)
    if k <= INT32_TERMS:
        return _int_product32(a, b)
    total = torch.zeros(m, n, dtype=torch.int64, device=a.device)
    for start in range(0, k, INT32_TERMS):
        total += _int_product32(a[:, start : start + INT32_TERMS], b[start : start + INT32_TERMS])
    return total


def _int_product32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if not int_mm_is_exact(a.device.type):
        return a.int() @ b.int() if a.device.type == "cpu" else (a.double() @ b.double()).to(torch.int32)
    if a.device.type == "cpu":
        return torch._int_mm(regular(a), regular(b))
    # cuBLASLt wants more than 16 rows and multiples of 8
    m, k, n = a.shape[0], a.shape[1], b.shape[1]
    rows, inner, columns = max(m, 24), k + -k % 8, n + -n % 8
    if (rows, inner, columns) != (m, k, n):
        a = torch.nn.functional.pad(a, (0, inner - k, 0, rows - m))
        b = torch.nn.functional.pad(b, (0, columns - n, 0, inner - k))
    return torch._int_mm(a.contiguous(), b.contiguous())[:m, :n]


def regular(x: torch.Tensor) -> torch.Tensor:
    """Give axes of size 1 their ordinary strides: ``_int_mm`` on CPU is silently wrong with others (torch 195066)."""
    return x.reshape(-1).view(x.shape) if 1 in x.shape else x


def matmul(a: torch.Tensor, b: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
    """Return the product of codes ``a`` [..., M, K] and ``b`` [..., K, N]; leading axes are equal."""
    if a.dim() == 2:
        return epilogue.apply_(int_product(a, b))
    lead = a.shape[:-2]
    count = lead.numel()  # a size of -1 would be ambiguous for a tensor without elements
    matrices = (x.reshape(count, *x.shape[-2:]) for x in (a, b))
    parts = [int_product(x, y) for x, y in zip(*matrices, strict=True)]
    if not parts:
        parts_tensor = torch.zeros(0, a.shape[-2], b.shape[-1], dtype=torch.int32, device=a.device)
    else:
        parts_tensor = torch.stack(parts)
    return epilogue.apply_(parts_tensor.reshape(*lead, a.shape[-2], b.shape[-1]))


def _batches(count: int, bytes_each: int, rows_each: int = 1) -> int:
    """Return how many samples one piece takes: small enough for the cache and for an int32 sum."""
    return max(1, min(count, PATCH_BYTES // max(bytes_each, 1), INT32_TERMS // max(rows_each, 1)))


def _words(x: torch.Tensor) -> torch.Tensor:
    """Return channels-last codes seen as the widest words that hold whole pixels: copies of patches run faster."""
    for dtype, width in ((torch.int64, 8), (torch.int32, 4), (torch.int16, 2)):
        if all(n % width == 0 for n in (x.shape[-1], x.storage_offset(), *x.stride()[:-1])):
            return x.view(dtype)
    return x


def _patch_rows(view: torch.Tensor, start: int, width: int, work: torch.Tensor) -> torch.Tensor:
    """Return the patches of some samples as rows of int8 codes, copied into ``work``."""
    piece = view[start : start + work.shape[0]]
    rows = work[: piece.shape[0]]
    rows.copy_(piece)
    return rows.view(torch.int8).view(-1, width)


def _work(view: torch.Tensor, step: int) -> torch.Tensor:
    """Return room for the patches of ``step`` samples: reused, because fresh pages cost more than the copy."""
    return torch.empty(step, *view.shape[1:], dtype=view.dtype, device=view.device)


def _group_blocks(groups: int, channels: int) -> list[tuple[int, int]]:
    """Return (first group, groups) of blocks that are worked on at once.

    Groups of few channels would make many thin products; a dense product over a block of them wastes arithmetic on
    the zeros off its diagonal and is still many times faster.
    """
    size = max(1, GROUP_CHANNELS // channels)
    return [(first, min(size, groups - first)) for first in range(0, groups, size)]


def _dense_weight(w: torch.Tensor, count: int) -> torch.Tensor:
    """Return the weight [count * co, ci, *kernel] of ``count`` groups as the matrix [taps * count * ci, count * co]."""
    if count == 1:
        return channels_last(w).view(w.shape[0], -1).t()
    co, ci = w.shape[0] // count, w.shape[1]
    taps = w.shape[2:].numel()
    dense = w.new_zeros(taps, count, ci, count, co)
    diagonal = w.reshape(count, co, ci, taps).permute(1, 2, 3, 0)  # [co, ci, taps, group]
    dense.diagonal(dim1=1, dim2=3).copy_(diagonal.permute(2, 1, 0, 3))
    return dense.view(taps * count * ci, count * co)


def conv_sum(x: torch.Tensor, w: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
    """Return the exact sums [N, *output, Co] for padded channels-last codes ``x`` [N, *spatial, Ci]."""
    groups, samples = geometry.groups, x.shape[0]
    output = geometry.output_size
    ci, co = x.shape[-1] // groups, w.shape[0] // groups
    taps = math.prod(geometry.kernel_size)
    dtype = torch.int32 if taps * ci <= INT32_TERMS else torch.int64
    total = torch.empty(samples, *output, w.shape[0], dtype=dtype, device=x.device)
    for first, count in _group_blocks(groups, ci):
        columns, width = slice(first * co, (first + count) * co), taps * ci * count
        matrix = _dense_weight(w[columns], count)
        view = patches(_words(x[..., first * ci : (first + count) * ci]), geometry)
        step = _batches(samples, math.prod(output) * width)
        work = _work(view, step)
        for start in range(0, samples, step):
            rows = _patch_rows(view, start, width, work)
            total[start : start + step, ..., columns] = int_product(rows, matrix).view(-1, *output, co * count)
    return total


def conv_output(x: torch.Tensor, w: torch.Tensor, geometry: ConvGeometry, epilogue: Epilogue) -> torch.Tensor:
    """Return the convolution of codes ``x`` [N, Ci, *] and ``w`` [Co, Ci/groups, *]."""
    padded = pad_spatial(channels_last(x), geometry.padding, geometry.padding)
    y = epilogue.apply_(channels_first(conv_sum(padded, w, geometry)))
    return in_result_order(y, result_is_last(x, w))


def conv_grad_input(grad: torch.Tensor, w: torch.Tensor, geometry: ConvGeometry, epilogue: Epilogue) -> torch.Tensor:
    """Return the gradient of the input from codes ``grad`` [N, Co, *] and ``w`` [Co, Ci/groups, *]."""
    g = geometry
    rows = channels_last(grad)
    dtype = torch.int32 if math.prod(g.kernel_size) * (w.shape[0] // g.groups) <= INT32_TERMS else torch.int64
    total = torch.zeros(rows.shape[0], *g.input_size, w.shape[1] * g.groups, dtype=dtype, device=grad.device)
    ones, zeros = (1,) * g.spatial, (0,) * g.spatial
    for phase in grad_input_phases(g):
        weight = phase_weight(w, phase, g.groups)
        padded = pad_spatial(rows, phase.low, phase.high)
        plain = ConvGeometry(
            ones, zeros, phase.dilation, g.groups, tuple(padded.shape[1:-1]), tuple(weight.shape[2:])
        )
        where = (slice(None), *phase.positions)
        total[where] = conv_sum(padded, weight, plain).to(dtype)
    return in_result_order(epilogue.apply_(channels_first(total)), result_is_last(grad, w))


def conv_grad_weight(grad: torch.Tensor, x: torch.Tensor, geometry: ConvGeometry, epilogue: Epilogue) -> torch.Tensor:
    """Return the gradient of the weight from codes ``grad`` [N, Co, *] and ``x`` [N, Ci, *]."""
    groups, samples = geometry.groups, x.shape[0]
    ci, co = x.shape[1] // groups, grad.shape[1] // groups
    taps, rows = math.prod(geometry.kernel_size), math.prod(geometry.output_size)
    padded = pad_spatial(channels_last(x), geometry.padding, geometry.padding)
    g_rows = channels_last(grad)
    dtype = torch.int32 if samples * rows <= INT32_TERMS else torch.int64
    total = torch.zeros(groups, co, taps, ci, dtype=dtype, device=x.device)
    for first, count in _group_blocks(groups, ci):
        view = patches(_words(padded[..., first * ci : (first + count) * ci]), geometry)
        width = taps * count * ci
        step = _batches(samples, rows * width, rows)
        work = _work(view, step)
        for start in range(0, samples, step):
            g_part = g_rows[start : start + step, ..., first * co : (first + count) * co].reshape(-1, count * co)
            part = int_product(g_part.t(), _patch_rows(view, start, width, work))
            diagonal = part.view(count, co, taps, count, ci).diagonal(dim1=0, dim2=3)  # [co, taps, ci, group]
            total[first : first + count] += diagonal.movedim(-1, 0)
    shaped = total.view(groups * co, *geometry.kernel_size, ci)
    return in_result_order(epilogue.apply_(channels_first(shaped)), result_is_last(grad, x))


def kernels() -> tuple[Kernel, ...]:
    """Return the kernels of this backend."""

    def always(request: Request) -> str | None:
        return None

    ops = (matmul, conv_output, conv_grad_input, conv_grad_weight)
    return tuple(Kernel(f.__name__, "torch", f, always) for f in ops)
