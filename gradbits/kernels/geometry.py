"""The shape of a convolution, and the views that turn it into matrix products."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product

import torch
import torch.nn.functional as F

Ints = tuple[int, ...]
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}  # by number of axes


@dataclass(frozen=True)
class ConvGeometry:
    """Stride, padding, dilation and groups of a convolution, one entry per spatial dimension, and its sizes.

    Args:
        stride, padding, dilation: one integer per spatial dimension.
        groups: number of groups.
        input_size: spatial size of the input.
        kernel_size: spatial size of the weight.
    """

    stride: Ints
    padding: Ints
    dilation: Ints
    groups: int
    input_size: Ints
    kernel_size: Ints

    @property
    def spatial(self) -> int:
        """Number of spatial dimensions."""
        return len(self.stride)

    @cached_property
    def output_size(self) -> Ints:
        """Spatial size of the output."""
        return tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(
                self.input_size, self.kernel_size, self.stride, self.padding, self.dilation, strict=True
            )
        )


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` [N, C, *spatial] as a contiguous [N, *spatial, C]; no copy where memory is in that order."""
    return x.movedim(1, -1).contiguous()


def channels_first(x: torch.Tensor) -> torch.Tensor:
    """Return the [N, C, *spatial] view of ``x`` [N, *spatial, C]; memory stays channels-last."""
    return x.movedim(-1, 1)


def result_is_last(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether a product of a convolution lies in memory channels-last, given its operands; contiguous otherwise.

    The rule of every product and backend, because rounding noise follows memory: channels-last where either operand is
    that and not contiguous too, as PyTorch's own convolutions have it.

    >>> x, w = torch.zeros(2, 3, 4, 4), torch.zeros(5, 3, 1, 1)
    >>> result_is_last(x, w), result_is_last(x.to(memory_format=torch.channels_last), w)
    (False, True)
    """
    return _is_last(a) or _is_last(b)


def _is_last(x: torch.Tensor) -> bool:
    if x.is_contiguous():
        return False
    last = FORMATS.get(x.dim())
    return x.movedim(1, -1).is_contiguous() if last is None else x.is_contiguous(memory_format=last)


def empty_result(shape: Ints, dtype: torch.dtype, last: bool) -> torch.Tensor:
    """Return room on the processor for a result [N, C, *spatial] in the order that ``result_is_last`` says."""
    if not last:
        return torch.empty(shape, dtype=dtype)
    wanted = FORMATS.get(len(shape))
    if wanted is not None:
        return torch.empty(shape, dtype=dtype, memory_format=wanted)
    return channels_first(torch.empty(shape[0], *shape[2:], shape[1], dtype=dtype))


def in_result_order(y: torch.Tensor, last: bool) -> torch.Tensor:
    """Return a result in the order that ``result_is_last`` says; no copy where its memory is in that order.

    >>> in_result_order(torch.zeros(2, 3, 1, 1).to(memory_format=torch.channels_last), False).stride()
    (3, 1, 1, 1)
    """
    y = channels_last(y) if last else y.contiguous()
    y = y.view(-1).view(y.shape)  # gives axes of size 1 their ordinary strides: later operations may look at them
    y = channels_first(y) if last else y
    return y.detach()  # what an autograd function returns must not be a view: it could not be changed in place


def pad_spatial(x: torch.Tensor, low: Ints, high: Ints) -> torch.Tensor:
    """Pad (or crop, where negative) ``x`` [N, *spatial, C] with zeros."""
    if not any(low) and not any(high):
        return x
    widths = [0, 0]
    for a, b in zip(reversed(low), reversed(high), strict=True):
        widths += [a, b]
    return F.pad(x, widths)


def patches(x: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
    """Return the strided view [N, *output, *kernel, C] of the padded channels-last input ``x`` [N, *spatial, C]."""
    strides = x.stride()[1:-1]
    outer = [st * s for st, s in zip(strides, geometry.stride, strict=True)]
    inner = [st * d for st, d in zip(strides, geometry.dilation, strict=True)]
    size = (x.shape[0], *geometry.output_size, *geometry.kernel_size, x.shape[-1])
    return x.as_strided(size, (x.stride(0), *outer, *inner, x.stride(-1)), x.storage_offset())


@dataclass(frozen=True)
class Phase:
    """One stride-1 convolution of the gradient that gives every stride-th position of ``grad_input``.

    Args:
        positions: which input positions, a slice per spatial dimension.
        taps: which kernel taps they meet, a slice per spatial dimension.
        low, high: padding of the gradient (negative: cropping).
        dilation: spacing of the taps in the gradient.
    """

    positions: tuple[slice, ...]
    taps: tuple[slice, ...]
    low: Ints
    high: Ints
    dilation: Ints


@lru_cache(maxsize=1024)
def grad_input_phases(geometry: ConvGeometry) -> tuple[Phase, ...]:
    """Return the convolutions that together give ``grad_input``; positions that no tap meets are in none of them.

    Input position h meets output j through tap k where h + p = s j + d k. For h = r mod s the taps are
    k0, k0 + s/e, ... with e = gcd(d, s), and the next tap lies d/e outputs further: no zeros need to be stuffed
    between the gradient's elements, and no product is wasted on them.
    """
    per_dim: list[list[tuple[slice, slice, int, int, int]]] = []
    for n, o, k, s, p, d in zip(
        geometry.input_size,
        geometry.output_size,
        geometry.kernel_size,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        strict=True,
    ):
        e = math.gcd(d, s)
        choices = []
        for r in range(min(s, n)):
            first = next((t for t in range(min(s // e, k)) if (r + p - t * d) % s == 0), None)
            if first is None:
                continue
            taps = len(range(first, k, s // e))
            count = len(range(r, n, s))
            shift = (r + p - first * d) // s
            low, high = (taps - 1) * (d // e) - shift, count - 1 + shift - (o - 1)
            choices.append((slice(r, None, s), slice(first, None, s // e), low, high, d // e))
        per_dim.append(choices)
    combinations = product(*per_dim)
    return tuple(Phase(*(tuple(column) for column in zip(*c, strict=True))) for c in combinations)


def phase_weight(w: torch.Tensor, phase: Phase, groups: int) -> torch.Tensor:
    """Return the phase's weight [Ci, Co/groups, *taps]: the taps picked, channels swapped within groups, flipped."""
    where = (slice(None), slice(None), *phase.taps)
    w = w[where]
    co, ci = w.shape[0], w.shape[1]
    w = w.reshape(groups, co // groups, ci, *w.shape[2:]).transpose(1, 2)
    w = w.reshape(groups * ci, co // groups, *w.shape[3:])
    return w.flip(tuple(range(2, w.dim()))).contiguous()


def patch_bytes(op: str, geometry: ConvGeometry, batch: int, w_shape: torch.Size) -> int:
    """Return the bytes of all patches of the operation, per stride-1 convolution that it is made of."""
    g = geometry
    pixels = batch * math.prod(g.kernel_size)
    if op != "conv_grad_input":
        return pixels * math.prod(g.output_size) * w_shape[1] * g.groups
    return pixels * math.prod(g.input_size) * w_shape[0] // math.prod(g.stride) ** 2


def terms_of(op: str, geometry: ConvGeometry, batch: int, w_shape: torch.Size) -> int:
    """Return how many products one sum of the operation has."""
    taps = math.prod(geometry.kernel_size)
    if op == "conv_output":
        return taps * w_shape[1]
    if op == "conv_grad_input":
        return taps * (w_shape[0] // geometry.groups)
    return batch * math.prod(geometry.output_size)
