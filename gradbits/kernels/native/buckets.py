"""Buckets to packed symbols and back through the native library, bit for bit as ``gradbits.kernels.buckets``."""

from __future__ import annotations

import ctypes

import torch

from gradbits.core import packing
from gradbits.core.errors import ArgumentError, CorruptDataError
from gradbits.core.noise import NoiseKey
from gradbits.kernels.native import library
from gradbits.kernels.native.quantize import EXPLICIT, KEYED

GIVEN, MAX, L2 = range(3)


class SymbolsArgs(ctypes.Structure):
    """``SymbolsArgs`` of wire.h."""

    _fields_ = [
        ("symbols", ctypes.c_void_p),
        ("packed", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]


class BucketArgs(ctypes.Structure):
    """``BucketArgs`` of wire.h."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("levels", ctypes.c_void_p),
        ("noise", ctypes.c_void_p),
        ("norms", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("packed", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("bucket", ctypes.c_int64),
        ("level_count", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("order", ctypes.c_int32),
        ("mode", ctypes.c_int32),
        ("k0", ctypes.c_int32),
        ("k1", ctypes.c_int32),
        ("add", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]


def pack_symbols(symbols: torch.Tensor, bits: int) -> torch.Tensor:
    """Return ``symbols`` packed as ``gradbits.core.packing.pack_symbols`` does."""
    if symbols.dtype != torch.uint8 or not 1 <= bits <= 8:
        return packing.pack_symbols(symbols, bits)
    flat, lib = symbols.reshape(-1).contiguous(), library.loaded()
    packed = torch.empty(packing.symbol_bytes(bits, flat.numel()), dtype=torch.uint8)
    lib.call("gradbits_pack_symbols", SymbolsArgs(flat.data_ptr(), packed.data_ptr(), flat.numel(), bits, lib.threads))
    return packed


def unpack_symbols(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return ``count`` symbols as ``gradbits.core.packing.unpack_symbols`` does."""
    fits = (
        packed.dtype == torch.uint8 and 1 <= bits <= 8 and 0 <= 8 * packed.numel() - count * bits <= 8 * packed.numel()
    )
    if not fits:
        return packing.unpack_symbols(packed, bits, count)
    flat, lib = packed.reshape(-1).contiguous(), library.loaded()
    symbols = torch.empty(count, dtype=torch.uint8)
    lib.call("gradbits_unpack_symbols", SymbolsArgs(symbols.data_ptr(), flat.data_ptr(), count, bits, lib.threads))
    return symbols


def _order(order: float) -> int:
    return L2 if order == 2.0 else MAX


def bucket_norms(x: torch.Tensor, bucket: int, order: float) -> torch.Tensor:
    """Return every bucket's norm as ``gradbits.kernels.buckets.bucket_norms`` does."""
    lib, x = library.loaded(), x.contiguous()
    bucket = max(1, min(bucket, x.numel()))
    norms = torch.empty(-(-x.numel() // bucket), dtype=torch.float32)
    args = BucketArgs(x=x.data_ptr(), norms=norms.data_ptr(), count=x.numel(), bucket=bucket)
    args.order, args.threads = _order(order), lib.threads
    lib.call("gradbits_bucket_norms", args)
    return norms


def encode_buckets(
    x: torch.Tensor,
    norms: torch.Tensor,
    levels: torch.Tensor,
    bucket: int,
    bits: int,
    noise: NoiseKey | torch.Tensor,
    order: float | None = None,
) -> torch.Tensor:
    """Return the packed symbols of ``x`` as ``gradbits.kernels.buckets.encode_buckets`` does."""
    lib, x, levels = library.loaded(), x.contiguous(), levels.contiguous()
    packed = torch.empty(packing.symbol_bytes(bits, x.numel()), dtype=torch.uint8)
    args = BucketArgs(x=x.data_ptr(), levels=levels.data_ptr(), norms=norms.data_ptr(), packed=packed.data_ptr())
    args.count, args.bucket = x.numel(), max(1, min(bucket, x.numel()))
    args.level_count, args.bits, args.threads = levels.numel(), bits, lib.threads
    args.order = GIVEN if order is None else _order(order)
    if isinstance(noise, NoiseKey):
        args.mode, args.k0, args.k1 = KEYED, noise.k0, noise.k1
    else:
        noise = noise.reshape(-1).to(torch.float32).contiguous()
        args.mode, args.noise = EXPLICIT, noise.data_ptr()
    lib.call("gradbits_encode_buckets", args)
    return packed


def decode_buckets(
    packed: torch.Tensor,
    norms: torch.Tensor,
    levels: torch.Tensor,
    bucket: int,
    bits: int,
    count: int,
    out: torch.Tensor | None = None,
    add: bool = True,
) -> torch.Tensor:
    """Return the values of ``count`` packed symbols as ``gradbits.kernels.buckets.decode_buckets`` does."""
    if packed.numel() < packing.symbol_bytes(bits, count) or norms.numel() * bucket < count:
        raise ArgumentError(f"packed: {packed.numel()} bytes, {norms.numel()} norms are too few for {count} symbols")
    lib, packed, norms, levels = library.loaded(), packed.contiguous(), norms.contiguous(), levels.contiguous()
    values = torch.empty(count, dtype=torch.float32) if out is None else out
    args = BucketArgs(packed=packed.data_ptr(), norms=norms.data_ptr(), levels=levels.data_ptr(), out=values.data_ptr())
    args.count, args.bucket, args.bits = count, max(1, min(bucket, count)), bits
    args.level_count, args.add, args.threads = levels.numel(), out is not None and add, lib.threads
    if lib.status("gradbits_decode_buckets", args):
        raise CorruptDataError(f"codes: a symbol has no level; there are {levels.numel()} levels")
    return values
