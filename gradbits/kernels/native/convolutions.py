"""Integer convolutions through the native library; arguments and bits as in ``gradbits.kernels.reference``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from gradbits.kernels import reference
from gradbits.kernels.dispatch import INT32_TERMS, Epilogue
from gradbits.kernels.geometry import (
    ConvGeometry,
    channels_first,
    empty_result,
    grad_input_phases,
    result_is_last,
    terms_of,
)
from gradbits.kernels.native import library
from gradbits.kernels.native.product_args import ProductArgs, Result, fits, plain_args, stored_dtype, triple

NARROW = 16  # groups of fewer channels are merged until they fill a register


def _conv_args(x: torch.Tensor, g: ConvGeometry, groups: int, channels: int) -> ProductArgs:
    """Return arguments for patches of codes ``x`` [N, C, *spatial] in any memory order."""
    args = ProductArgs.from_buffer_copy(_patch_args(x.shape, x.stride(), g, groups, channels))
    args.x = x.data_ptr()
    return args


@lru_cache(maxsize=1024)
def _patch_args(shape: torch.Size, s: tuple[int, ...], g: ConvGeometry, groups: int, channels: int) -> ProductArgs:
    """Return the arguments that do not change from call to call, to be copied."""
    args = plain_args()
    args.samples, args.channels, args.groups = shape[0], channels, groups
    args.x_group, args.x_sample, args.x_channel, args.x_axis = channels * s[1], s[0], s[1], triple(s[2:], 0)
    args.size, args.count, args.taps = triple(shape[2:], 1), triple(g.output_size, 1), triple(g.kernel_size, 1)
    args.stride, args.padding, args.dilation = triple(g.stride, 1), triple(g.padding, 0), triple(g.dilation, 1)
    return args


def _merged(groups: int, channels: int) -> int:
    """Return how many groups are worked on as one: products with the zeros between them cost less than thin ones."""
    return next(f for f in range(min(groups, max(1, NARROW // max(channels, 1))), 0, -1) if groups % f == 0)


def _dense(w: torch.Tensor, groups: int, merged: int) -> torch.Tensor:
    """Return the weight [Co, Ci/groups, *] of every ``merged`` groups as that of one."""
    if merged == 1:
        return w
    co, ci, taps = w.shape[0] // groups, w.shape[1], w.shape[2:].numel()
    dense = w.new_zeros(groups // merged, merged, co, merged, ci, taps)
    dense.diagonal(dim1=1, dim2=3).copy_(w.reshape(groups // merged, merged, co, ci, taps).permute(0, 2, 3, 4, 1))
    return dense.view(w.shape[0], merged * ci, *w.shape[2:])


def _strides_of(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return how far apart neighbours along each axis are in a flat index."""
    return tuple(math.prod(sizes[i + 1 :]) for i in range(len(sizes)))


def conv_output(x: torch.Tensor, w: torch.Tensor, geometry: ConvGeometry, epilogue: Epilogue) -> torch.Tensor:
    """Return the convolution of codes ``x`` [N, Ci, *] and ``w`` [Co, Ci/groups, *]."""
    if not fits(epilogue) or terms_of("conv_output", geometry, 1, w.shape) > INT32_TERMS:
        return reference.conv_output(x, w, geometry, epilogue)
    g, lib = geometry, library.loaded()
    depthwise = _is_depthwise(x, w.shape[0], w.shape[1], g)
    merged = 1 if depthwise else _merged(g.groups, w.shape[1])
    out = empty_result((x.shape[0], w.shape[0], *g.output_size), stored_dtype(epilogue), result_is_last(x, w))
    groups, w = g.groups // merged, _dense(w, g.groups, merged)
    args = _conv_args(x, g, groups, w.shape[1])
    s, columns = w.stride(), w.shape[0] // groups
    args.w, args.columns = w.data_ptr(), columns
    args.w_group, args.w_column, args.w_channel, args.w_tap = columns * s[0], s[0], s[1], triple(s[2:], 0)
    args.step = triple(_strides_of(g.output_size), 0)
    result = Result(out.shape, epilogue, groups)
    result.fill(args, out, lib)
    lib.call("gradbits_depth_rows" if depthwise else "gradbits_rows", args)
    return out.to(epilogue.dtype)


def _is_depthwise(x: torch.Tensor, columns: int, channels: int, g: ConvGeometry) -> bool:
    """Whether every group of ``x`` has one channel and gives one, and channels are adjacent in memory."""
    return g.groups > 1 and channels == 1 and columns == g.groups and x.stride(1) == 1


@dataclass(frozen=True)
class _Phase:
    """What the arguments of one stride-1 convolution of ``grad_input`` are besides those of the whole.

    Args:
        last: offset of the last tap in the weight's memory.
        first: index of the first position.
        triples: the arguments that have three entries, by name.
    """

    last: int
    first: int
    triples: dict[str, Any]


@lru_cache(maxsize=1024)
def _phases(g: ConvGeometry, strides: tuple[int, ...]) -> tuple[_Phase, ...]:
    """Return the phases of a convolution whose weight has ``strides`` along the taps."""
    flat, found = _strides_of(g.input_size), []
    for phase in grad_input_phases(g):
        taps = [range(*part.indices(k)) for part, k in zip(phase.taps, g.kernel_size, strict=True)]
        places = [range(*part.indices(n)) for part, n in zip(phase.positions, g.input_size, strict=True)]
        triples = {
            "w_tap": triple([-t.step * stride for t, stride in zip(taps, strides, strict=True)], 0),
            "taps": triple([len(t) for t in taps], 1),
            "count": triple([len(r) for r in places], 1),
            "padding": triple(phase.low, 0),
            "dilation": triple(phase.dilation, 1),
            "step": triple([r.step * f for r, f in zip(places, flat, strict=True)], 0),
        }
        last = sum(t[-1] * stride for t, stride in zip(taps, strides, strict=True))
        found.append(_Phase(last, sum(r.start * f for r, f in zip(places, flat, strict=True)), triples))
    return tuple(found)


def conv_grad_input(grad: torch.Tensor, w: torch.Tensor, geometry: ConvGeometry, epilogue: Epilogue) -> torch.Tensor:
    """Return the gradient of the input from codes ``grad`` [N, Co, *] and ``w`` [Co, Ci/groups, *]."""
    if not fits(epilogue) or terms_of("conv_grad_input", geometry, 1, w.shape) > INT32_TERMS:
        return reference.conv_grad_input(grad, w, geometry, epilogue)
    g, lib = geometry, library.loaded()
    depthwise = _is_depthwise(grad, w.shape[0], w.shape[1], g)
    rows = "gradbits_depth_rows" if depthwise else "gradbits_rows"
    merged = 1 if depthwise else _merged(g.groups, w.shape[0] // g.groups)
    shape = (grad.shape[0], w.shape[1] * g.groups, *g.input_size)
    out = empty_result(shape, stored_dtype(epilogue), result_is_last(grad, w))
    groups, w = g.groups // merged, _dense(w, g.groups, merged)
    s, channels = w.stride(), w.shape[0] // groups
    result = Result(out.shape, epilogue, groups)
    args = _conv_args(grad, g, groups, channels)
    args.columns, args.w_column, args.w_channel, args.w_group = w.shape[1], s[1], s[0], channels * s[0]
    args.stride = triple((), 1)
    result.fill(args, out, lib)
    positions = triple(_strides_of(g.input_size), 0)
    phases = _phases(g, s[2:])
    if len(phases) < math.prod(min(st, n) for st, n in zip(g.stride, g.input_size, strict=True)):
        # no tap meets some positions: first give all of them the epilogue of an empty sum
        args.channels, args.taps, args.count = 0, triple((), 1), triple(g.input_size, 1)
        args.w, args.first, args.step = w.data_ptr(), 0, positions
        lib.call(rows, args)
        args.channels = channels
    for phase in phases:
        args.w = w.data_ptr() + phase.last  # taps run backwards
        args.first = phase.first
        for name, value in phase.triples.items():
            setattr(args, name, value)
        lib.call(rows, args)
    return out.to(epilogue.dtype)


def conv_grad_weight(grad: torch.Tensor, x: torch.Tensor, geometry: ConvGeometry, epilogue: Epilogue) -> torch.Tensor:
    """Return the gradient of the weight from codes ``grad`` [N, Co, *] and ``x`` [N, Ci, *]."""
    g, ci = geometry, x.shape[1] // geometry.groups
    depthwise = _is_depthwise(x, grad.shape[1], ci, g) and grad.stride(1) == 1 and fits(epilogue)
    merged = 1 if depthwise else _merged(g.groups, max(ci, grad.shape[1] // g.groups))
    if merged > 1:
        co, taps = grad.shape[1] // g.groups, math.prod(g.kernel_size)
        dense = _grad_weight(grad, x, g, g.groups // merged, Epilogue(torch.ones(())))
        parts = dense.contiguous().view(g.groups // merged, merged, co, merged, ci, taps).diagonal(dim1=1, dim2=3)
        if result_is_last(grad, x):
            sums = channels_first(parts.permute(0, 4, 1, 3, 2).contiguous().view(g.groups * co, *g.kernel_size, ci))
        else:
            sums = parts.permute(0, 4, 1, 2, 3).contiguous().view(g.groups * co, ci, *g.kernel_size)
        return epilogue.apply_(sums)
    if not fits(epilogue):
        return reference.conv_grad_weight(grad, x, geometry, epilogue)
    kernel = "gradbits_depth_columns" if depthwise else "gradbits_columns"
    return _grad_weight(grad, x, g, g.groups, epilogue, kernel).to(epilogue.dtype)


def _grad_weight(
    grad: torch.Tensor, x: torch.Tensor, g: ConvGeometry, groups: int, e: Epilogue, kernel: str = "gradbits_columns"
) -> torch.Tensor:
    lib, s = library.loaded(), grad.stride()
    channels, columns = x.shape[1] // groups, grad.shape[1] // groups
    shape = (grad.shape[1], channels, *g.kernel_size)
    y = empty_result(shape, stored_dtype(e), result_is_last(grad, x))
    args = _conv_args(x, g, groups, channels)
    args.w, args.columns = grad.data_ptr(), columns
    args.w_group, args.w_column, args.w_channel, args.w_tap = columns * s[1], s[1], s[0], triple(s[2:], 0)
    result = Result(y.shape, e, groups, group_axis=0)
    result.fill(args, y, lib)
    lib.call(kernel, args)
    return y
