"""Values to codes, and values to ranges, through the native library."""

from __future__ import annotations

import ctypes

import torch

from gradbits.core.noise import NoiseKey
from gradbits.kernels.native import library
from gradbits.kernels.quantize import CodeMap, Noise, memory_order

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NEAREST, KEYED, EXPLICIT = range(3)
NO_KEY = NoiseKey(0, 0)


class QuantizeArgs(ctypes.Structure):
    """``QuantizeArgs`` of native.h."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("outer", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("r", ctypes.c_void_p),
        ("a", ctypes.c_void_p),
        ("z", ctypes.c_void_p),
        ("noise", ctypes.c_void_p),
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("mode", ctypes.c_int32),
        ("k0", ctypes.c_int32),
        ("k1", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]


class SymmetricArgs(ctypes.Structure):
    """``SymmetricArgs`` of native.h."""

    _fields_ = [
        ("quantize", QuantizeArgs),
        ("width", ctypes.c_void_p),
        ("found", ctypes.c_void_p),
        ("largest", ctypes.c_float),
    ]


class RangeArgs(ctypes.Structure):
    """``RangeArgs`` of native.h."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("low", ctypes.c_void_p),
        ("high", ctypes.c_void_p),
        ("outer", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]


def _dense(x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Return ``x`` in a dtype the library reads and without gaps, and its axes in memory order."""
    if x.dtype not in DTYPES:
        x = x.to(torch.float32)
    if x.is_contiguous():
        return x, tuple(range(x.dim()))
    order = memory_order(x)
    return (x.contiguous(), tuple(range(x.dim()))) if order is None else (x, order)


def quantize(x: torch.Tensor, code_map: CodeMap, noise: Noise = None) -> torch.Tensor:
    """Return int8 codes of ``x`` in its shape and memory order, as ``gradbits.kernels.quantize.quantize`` does."""
    lib = library.loaded()
    x, order = _dense(x)
    shape = [x.shape[axis] for axis in order]
    codes = torch.empty(shape, dtype=torch.int8)
    total = codes.numel()
    count, outer = 1, 1
    for p in (code_map.inverse, code_map.shift, code_map.zero):
        if p is not None and p.numel() > 1:
            sizes = [p.shape[axis] for axis in order] if p.dim() == x.dim() else list(p.shape)
            axis = next(i for i, n in enumerate(sizes) if n > 1)
            count = sizes[axis]
            for n in shape[:axis]:
                outer *= n
            break
    keep: list[torch.Tensor] = []

    def pointer(p: torch.Tensor | None) -> int | None:
        if p is None:
            return None
        if p.dtype == torch.float32 and p.numel() == count and p.is_contiguous():
            return p.data_ptr()
        keep.append(p.to(torch.float32).reshape(-1).expand(count).contiguous())
        return keep[-1].data_ptr()

    if total:
        mode, key, explicit = _noise_of(noise, order)
        args = QuantizeArgs(
            x.data_ptr(), codes.data_ptr(), outer, count, total // (outer * count),
            pointer(code_map.inverse), pointer(code_map.shift), pointer(code_map.zero), _pointer(explicit),
            code_map.low, code_map.high, DTYPES[x.dtype], mode, key.k0, key.k1, lib.threads,
        )  # fmt: skip
        lib.call("gradbits_quantize", args)
    return _in_order_of(codes, order)


def quantize_symmetric(
    x: torch.Tensor, largest: int, noise: Noise, found: torch.Tensor, width: torch.Tensor | None = None
) -> torch.Tensor:
    """Return codes and fill ``found`` as ``gradbits.kernels.quantize.quantize_symmetric`` does."""
    lib = library.loaded()
    if not (x.dtype in DTYPES and _is_dense(x)):
        x, _ = _dense(x)
    codes = torch.empty_like(x, dtype=torch.int8)
    explicit = torch.empty_like(x, dtype=torch.float32).copy_(noise) if isinstance(noise, torch.Tensor) else None
    key = noise if isinstance(noise, NoiseKey) else NO_KEY
    mode = NEAREST if noise is None else KEYED if explicit is None else EXPLICIT
    args = SymmetricArgs(
        QuantizeArgs(
            x.data_ptr(), codes.data_ptr(), 1, 1, codes.numel(), None, None, None, _pointer(explicit),
            0, 0, DTYPES[x.dtype], mode, key.k0, key.k1, lib.threads,
        ),
        _pointer(width), found.data_ptr(), largest,
    )  # fmt: skip
    lib.call("gradbits_symmetric", args)
    return codes


def _is_dense(x: torch.Tensor) -> bool:
    """Whether ``x`` has no gaps; the usual orders are asked for first."""
    usual = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return usual or memory_order(x) is not None


def _noise_of(noise: Noise, order: tuple[int, ...]) -> tuple[int, NoiseKey, torch.Tensor | None]:
    """Return where rounding noise comes from: the mode, the key, the noise itself in memory order."""
    if isinstance(noise, NoiseKey):
        return KEYED, noise, None
    if noise is None:
        return NEAREST, NO_KEY, None
    return EXPLICIT, NO_KEY, noise.to(torch.float32).permute(order).contiguous()


def _pointer(value: torch.Tensor | None) -> int | None:
    return None if value is None else value.data_ptr()


def _in_order_of(codes: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Return ``codes``, whose axes are in memory order, with the axes that the values had."""
    if list(order) == sorted(order):
        return codes
    return codes.permute(sorted(range(len(order)), key=order.__getitem__))


def min_max(x: torch.Tensor, axis: int | None = None) -> torch.Tensor:
    """Return minimum and maximum as ``gradbits.kernels.coding.min_max`` does."""
    lib = library.loaded()
    x, order = _dense(x)
    if axis is None:
        shape: tuple[int, ...] = ()
        outer, count, inner = 1, 1, x.numel()
    else:
        place = order.index(axis)
        sizes = [x.shape[i] for i in order]
        shape = (sizes[place],)
        outer, count = torch.Size(sizes[:place]).numel(), sizes[place]
        inner = torch.Size(sizes[place + 1 :]).numel()
    found = torch.empty(2, *shape)
    low = found.data_ptr()
    args = RangeArgs(x.data_ptr(), low, low + 4 * count, outer, count, inner, DTYPES[x.dtype], lib.threads)
    lib.call("gradbits_range", args)
    return found
