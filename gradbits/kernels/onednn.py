"""Convolutions through the int8 kernels that PyTorch ships for x86 processors; exact, and faster than patches."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from gradbits.kernels import reference
from gradbits.kernels.dispatch import Epilogue, Kernel, Request
from gradbits.kernels.geometry import (
    ConvGeometry,
    channels_first,
    channels_last,
    grad_input_phases,
    in_result_order,
    pad_spatial,
    phase_weight,
    result_is_last,
)

PATCHES_PAY = 1 << 20  # below this many bytes of patches, building them is cheaper than preparing a convolution
TERMS = 65_536  # 255 * 128 * TERMS < 2^31: codes travel as unsigned bytes there


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Return why these kernels cannot be used here, or None.

    The worst case is run once: without VNNI the same kernels may saturate in 16 bits.
    """
    if not hasattr(torch.ops.onednn, "qconv2d_pointwise"):
        return "this build of PyTorch has no onednn.qconv2d_pointwise"
    geometry = ConvGeometry((1, 1), (1, 1), (1, 1), 1, (4, 4), (3, 3))
    x = torch.full((1, 64, 4, 4), 127, dtype=torch.int8)
    w = torch.full((16, 64, 3, 3), 127, dtype=torch.int8)
    w[::2] = -128
    try:
        got = _conv(x, w, geometry, None)
    except RuntimeError as error:
        return f"onednn.qconv2d_pointwise fails here: {str(error).splitlines()[0]}"
    want = torch.conv2d(x.double(), w.double(), padding=1)
    return None if torch.equal(got.double(), want) else "not exact here: the processor lacks int8 dot products (VNNI)"


def _conv(x: torch.Tensor, w: torch.Tensor, geometry: ConvGeometry, epilogue: Epilogue | None) -> torch.Tensor:
    """Return the convolution of codes as float32 sums, times the epilogue's scale and plus its bias where it fuses."""
    g, co = geometry, w.shape[0]
    scale, bias = torch.ones(co), None
    if epilogue is not None:
        scale = epilogue.scale.reshape(-1).expand(co).contiguous()
        bias = None if epilogue.bias is None else epilogue.bias.reshape(-1).to(torch.float32)
    if g.output_size[-1] == 1:  # wrong sums were seen for outputs one column wide
        flat = Epilogue(scale.view(-1, 1, 1), bias=None if bias is None else bias.view(-1, 1, 1))
        return reference.conv_output(x, w, g, flat)
    rows = channels_last(x)
    # wrong results and crashes were seen where the padding covers the whole kernel: pad by hand there
    if any(p > d * (k - 1) for p, d, k in zip(g.padding, g.dilation, g.kernel_size, strict=True)):
        rows = pad_spatial(rows, g.padding, g.padding)
        g = replace(g, padding=(0, 0))
    # the zero point 128 turns signed codes into unsigned ones; padding becomes exactly zero
    x8 = channels_first(rows.view(torch.uint8) ^ 128)
    zero = torch.zeros(co, dtype=torch.int64)
    sizes = (list(g.stride), list(g.padding), list(g.dilation), g.groups)
    packed = torch.ops.onednn.qconv_prepack(w, scale, 1.0, 128, *sizes, list(x8.shape))
    return torch.ops.onednn.qconv2d_pointwise(
        x8, 1.0, 128, packed, scale, zero, bias, *sizes, 1.0, 0, torch.float32, "none", [], ""
    )


def _fuses(epilogue: Epilogue) -> bool:
    """Whether the kernel's own epilogue gives the same bits: one scale, or one per output channel, and nothing more."""
    channels_only = all(n == 1 for axis, n in enumerate(epilogue.scale.shape) if axis != 1)
    more = epilogue.terms or epilogue.activation or epilogue.dtype != torch.float32
    return channels_only and not more


def _as_2d(geometry: ConvGeometry) -> ConvGeometry:
    g = geometry
    return ConvGeometry(
        (1, *g.stride), (0, *g.padding), (1, *g.dilation), g.groups, (1, *g.input_size), (1, *g.kernel_size)
    )


def conv_output(x: torch.Tensor, w: torch.Tensor, geometry: ConvGeometry, epilogue: Epilogue) -> torch.Tensor:
    """Return the convolution of codes ``x`` [N, Ci, *] and ``w`` [Co, Ci/groups, *]."""
    last = result_is_last(x, w)
    flat = geometry.spatial == 1
    if flat:
        x, w, geometry = x.unsqueeze(2), w.unsqueeze(2), _as_2d(geometry)
    fused = _fuses(epilogue)
    y = _conv(x, w, geometry, epilogue if fused else None)
    if flat:
        y = y.squeeze(2)
    return in_result_order(y if fused else epilogue.apply_(y), last)


def conv_grad_input(grad: torch.Tensor, w: torch.Tensor, geometry: ConvGeometry, epilogue: Epilogue) -> torch.Tensor:
    """Return the gradient of the input from codes ``grad`` [N, Co, *] and ``w`` [Co, Ci/groups, *]."""
    last = result_is_last(grad, w)
    flat = geometry.spatial == 1
    if flat:
        grad, w, geometry = grad.unsqueeze(2), w.unsqueeze(2), _as_2d(geometry)
    g = geometry
    phases = grad_input_phases(g)
    direct = all(stride == 1 for stride in g.stride)  # one phase covers every position
    fused = direct and _fuses(epilogue)
    rows = channels_last(grad)
    total = channels_first(torch.zeros(0 if direct else rows.shape[0], *g.input_size, w.shape[1] * g.groups))
    for phase in phases:
        weight = phase_weight(w, phase, g.groups)
        symmetric = phase.low == phase.high and min(phase.low) >= 0
        padding = phase.low if symmetric else (0, 0)
        padded = rows if symmetric else pad_spatial(rows, phase.low, phase.high)
        plain = ConvGeometry(
            (1, 1), padding, phase.dilation, g.groups, tuple(padded.shape[1:-1]), tuple(weight.shape[2:])
        )
        part = _conv(channels_first(padded), weight, plain, epilogue if fused else None)
        if direct:
            total = part
        else:
            where = (slice(None), slice(None), *phase.positions)
            total[where] = part
    if flat:
        total = total.squeeze(2)
    return in_result_order(total if fused else epilogue.apply_(total), last)


def why_not(request: Request) -> str | None:
    """Return why a request cannot run here, or None."""
    if request.device != "cpu":
        return f"runs on the processor only, not on {request.device}"
    if request.spatial not in (1, 2):
        return f"has 1 and 2 spatial dimensions, not {request.spatial}"
    if request.patch_bytes is not None and request.patch_bytes < PATCHES_PAY:
        return "the product is so small that preparing it here costs more than patches"
    if request.terms > TERMS:
        return f"{request.terms} products in a sum could overflow int32"
    return unavailable()


def kernels() -> tuple[Kernel, ...]:
    """Return the kernels of this backend."""
    return tuple(Kernel(f.__name__, "onednn", f, why_not) for f in (conv_output, conv_grad_input))
