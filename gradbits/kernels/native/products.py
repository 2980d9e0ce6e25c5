"""Integer products of matrices through the native library; arguments and bits as in ``gradbits.kernels.reference``."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from gradbits.kernels import reference
from gradbits.kernels.dispatch import INT32_TERMS, Epilogue
from gradbits.kernels.native import library
from gradbits.kernels.native.product_args import FinishArgs, Result, fits, plain_args, stored_dtype, triple

LARGE = 1 << 22  # sums of a matrix product that leave the caches


def matmul(a: torch.Tensor, b: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
    """Return the product of codes ``a`` [..., M, K] and ``b`` [..., K, N]; leading axes are equal.

    Measured: without a matrix unit, a single matrix is multiplied faster by ``torch._int_mm``, where that is exact, as
    long as the int32 sums that it leaves for the epilogue stay in the caches.
    """
    small = a.dim() == 2 and 0 < a.shape[0] * b.shape[1] < LARGE and 0 < a.shape[1] <= INT32_TERMS
    if small and library.loaded().level < library.LEVELS["amx"] and fits(epilogue) and reference.int_mm_is_exact("cpu"):
        return _finished(a, b, epilogue)
    return own_matmul(a, b, epilogue)


def _finished(a: torch.Tensor, b: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
    """Return the product with sums by ``torch._int_mm``, which become floats where they are."""
    m, n, lib = a.shape[0], b.shape[1], library.loaded()
    rows = m + 16 // n + 1  # the kernel reads by 16
    sums = torch.empty(rows, n, dtype=torch.int32)[:m]
    torch._int_mm(reference.regular(a), reference.regular(b), out=sums)
    stored = stored_dtype(epilogue)
    y = sums.view(torch.float32) if stored == torch.float32 else torch.empty(m, n, dtype=stored)
    args = FinishArgs(sums.data_ptr(), plain_args())
    product = args.product
    product.columns, product.count = n, triple((m,), 1)
    result = Result((1, m, n), epilogue, matrix="position")
    result.fill(product, y, lib)
    lib.call("gradbits_finish", args)
    return y if y.dtype == epilogue.dtype else y.to(epilogue.dtype)


def own_matmul(a: torch.Tensor, b: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
    """Return ``matmul`` by the library alone."""
    lead, (m, k), n = a.shape[:-2], a.shape[-2:], b.shape[-1]
    by_sums = a.stride(-1) != 1 and a.stride(-2) == 1 and m > 1  # a is transposed, as in grad_weight: sums over rows
    if not fits(epilogue) or (k > INT32_TERMS and not by_sums):
        return reference.matmul(a, b, epilogue)
    batch = math.prod(lead)
    if len(lead) != 1:
        a, b = a.reshape(batch, m, k), b.reshape(batch, k, n)
        epilogue = _batched(epilogue, (batch, m, n), (*lead, m, n)) if lead else epilogue
    y, args, lib = torch.empty(batch, m, n, dtype=stored_dtype(epilogue)), plain_args(), library.loaded()
    args.groups, args.samples = batch, 1
    if by_sums:
        args.x, args.w, args.channels, args.columns = b.data_ptr(), a.data_ptr(), n, m
        args.count = args.size = triple((k,), 1)
        args.x_group, args.x_channel, args.x_axis = b.stride(0), b.stride(2), triple((b.stride(1),), 0)
        args.w_group, args.w_column, args.w_tap = a.stride(0), a.stride(1), triple((a.stride(2),), 0)
    else:
        args.x, args.w, args.channels, args.columns = a.data_ptr(), b.data_ptr(), k, n
        args.count = args.size = triple((m,), 1)
        args.x_group, args.x_channel, args.x_axis = a.stride(0), a.stride(2), triple((a.stride(1),), 0)
        args.w_group, args.w_column, args.w_channel = b.stride(0), b.stride(2), b.stride(1)
        args.step = triple((1,), 0)
    result = Result(y.shape, epilogue, matrix="sample" if by_sums else "position")
    result.fill(args, y, lib)
    lib.call("gradbits_columns" if by_sums else "gradbits_rows", args)
    return y.reshape(*lead, m, n).to(epilogue.dtype)


def _batched(epilogue: Epilogue, flat: tuple[int, ...], full: tuple[int, ...]) -> Epilogue:
    """Return the epilogue of a product whose leading axes are flattened into one."""

    def turn(t: torch.Tensor) -> torch.Tensor:
        return t.reshape(()) if t.numel() == 1 else t.expand(full).reshape(flat)

    bias = None if epilogue.bias is None else turn(epilogue.bias)
    return replace(epilogue, scale=turn(epilogue.scale), terms=tuple(turn(t) for t in epilogue.terms), bias=bias)
