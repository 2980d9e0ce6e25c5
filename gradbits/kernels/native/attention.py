"""Attention in 8 bits through the native library."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import torch

from gradbits.core.noise import NoiseKey
from gradbits.kernels.attention import Attended, Attending, empty_output
from gradbits.kernels.native import library
from gradbits.kernels.native.quantize import DTYPES


class Rows(ctypes.Structure):
    """``Rows`` of native.h."""

    _fields_ = [("at", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "row"))]

    @staticmethod
    def of(x: torch.Tensor) -> Rows:
        """Return where the rows of ``x`` [batch, heads, length, width] are."""
        return Rows(x.data_ptr(), *x.stride()[:3])


class AttentionArgs(ctypes.Structure):
    """``AttentionArgs`` of native.h."""

    _fields_ = [
        *((name, Rows) for name in ("query", "key", "value", "output")),
        *((name, Rows) for name in ("gradient", "grad_query", "grad_key", "grad_value")),
        *((name, ctypes.c_void_p) for name in ("query_codes", "key_codes", "value_codes", "scales", "tops", "sums")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "queries", "keys", "width", "value_width")),
        *((name, ctypes.c_float) for name in ("scale", "steepness")),
        *((name, ctypes.c_int32 * 2) for name in ("gradient_noise", "slope_noise")),
        *((name, ctypes.c_int32) for name in ("dtype", "causal", "threads")),
    ]


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: Attending) -> Attended:
    """Return attention of [batch, heads, length, width]."""
    dtype = query.dtype
    query, key, value = (_rows(x, dtype) for x in (query, key, value))
    (batch, heads, length, width), keys, value_width = query.shape, key.shape[2], value.shape[3]
    both = batch * heads
    sizes = ((length, width), (keys, width), (keys, value_width))
    codes = [torch.empty(both, *size, dtype=torch.int8) for size in sizes]
    tops, sums = (torch.empty(both, length, dtype=whole) for whole in (torch.int32, torch.int64))
    out = Attended(empty_output(query, value_width), codes[0], codes[1], codes[2], torch.empty(3, both), tops, sums)
    args = _args(out.saved, (batch, heads), how, query.dtype)
    args.query, args.key, args.value, args.output = (Rows.of(x) for x in (query, key, value, out.output))
    library.loaded().call("gradbits_attention", args)
    return out if out.output.dtype == dtype else replace(out, output=out.output.to(dtype))


def attention_gradients(
    g: torch.Tensor, saved: tuple[torch.Tensor, ...], how: Attending, noise: tuple[NoiseKey, NoiseKey]
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of queries, keys and values, [batch, heads, length, width] in the dtype of ``g``."""
    dtype, sizes = g.dtype, g.shape[:2]
    g, saved = _rows(g, dtype), tuple(x.contiguous() for x in saved)  # hooks may give back other strides
    lengths = [(*sizes, *codes.shape[1:]) for codes in saved[:3]]
    found = [empty_output(g.new_empty(()).expand(*shape), shape[-1]) for shape in lengths]
    args = _args(saved, sizes, how, g.dtype)
    args.gradient = Rows.of(g)
    args.grad_query, args.grad_key, args.grad_value = (Rows.of(x) for x in found)
    for field, key in zip((args.gradient_noise, args.slope_noise), noise, strict=True):
        field[:] = (key.k0, key.k1)
    library.loaded().call("gradbits_attention", args)
    return tuple(x.to(dtype) for x in found)


def _args(
    saved: tuple[torch.Tensor, ...], sizes: tuple[int, ...], how: Attending, dtype: torch.dtype
) -> AttentionArgs:
    """Return what both passes are told."""
    query, _, value = saved[:3]
    args = AttentionArgs(
        batch=sizes[0], heads=sizes[1], queries=query.shape[1], keys=value.shape[1], width=query.shape[2],
        value_width=value.shape[2], scale=how.scale, steepness=how.steepness, dtype=DTYPES[dtype],
        causal=how.causal, threads=library.loaded().threads,
    )  # fmt: skip
    for name, tensor in zip(("query_codes", "key_codes", "value_codes", "scales", "tops", "sums"), saved, strict=True):
        setattr(args, name, tensor.data_ptr())
    return args


def _rows(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return ``x`` as the kernel takes it: float32 or bfloat16, what a row holds adjacent."""
    x = x.resolve_neg().to(dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
