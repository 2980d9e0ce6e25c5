"""Fake quantization on a given grid: what quantization-aware training computes where scale and zero point are known."""

from __future__ import annotations

import torch

from gradbits.core.checks import check_axis, check_float_tensor, check_integer
from gradbits.core.errors import ArgumentError, DtypeError
from gradbits.kernels.dispatch import Request, run
from gradbits.kernels.quantize import CodeMap
from gradbits.quantizers.estimators import StraightThrough


def fake_quantize(
    x: torch.Tensor,
    scale: torch.Tensor | float,
    zero_point: torch.Tensor | int,
    low: int,
    high: int,
    axis: int | None = None,
) -> torch.Tensor:
    r"""Return ``x`` rounded to a given grid and clipped to its ends, with the clipped straight-through gradient.

    .. math:: q = \mathrm{round}(x/s) + Z, \qquad \hat{x} = s\,(\mathrm{clamp}(q, q_\min, q_\max) - Z), \qquad
              \frac{\partial L}{\partial x} = \frac{\partial L}{\partial \hat{x}}\,1[q_\min \le q \le q_\max]

    Round is half to even; the division is a product with the float32 reciprocal. The gradient passes wherever the code
    before clipping is legal, so up to half a step beyond the outermost values. NaN and Inf come back as they are.

    Args:
        x: floating-point values of any shape; computed in float32.
        scale: positive ``s``; one number, or with ``axis`` one for each index along it.
        zero_point: integer ``Z``, the code of real zero; one, or as many as scales.
        low, high: the legal codes ``q_min < q_max``, at most 256 of them.
        axis: the axis along which scale and zero point vary, or None.

    Raises:
        DtypeError: ``x`` is not a floating-point tensor, or an argument has a wrong type.
        ArgumentError: codes, scale or zero point out of range, or not one for each index along ``axis``.

    >>> x = torch.tensor([-1.0, 0.26, 9.0], requires_grad=True)
    >>> y = fake_quantize(x, 0.5, 3, 0, 15); y.tolist()
    [-1.0, 0.5, 6.0]
    >>> y.sum().backward(); x.grad.tolist()
    [1.0, 1.0, 0.0]
    """
    check_float_tensor(x, "x")
    check_integer(low, "low", -(1 << 31), (1 << 31) - 2)
    check_integer(high, "high", low + 1, low + 255)
    shape = [1] * x.dim()
    if axis is not None:
        axis = check_axis(axis, "axis", x.dim())
        shape[axis] = x.shape[axis]
    s = _parameter(scale, "scale", shape, axis, x).float()
    z = _parameter(zero_point, "zero_point", shape, axis, x)
    if z.is_floating_point() and not bool((z == z.round()).all()):
        raise ArgumentError(f"zero_point={zero_point!r}: must be integers")
    if not bool((torch.isfinite(s) & (s > 0)).all()):
        raise ArgumentError(f"scale={scale!r}: must be positive and finite")
    # codes travel as int8: all of them move so that the lowest is -128
    moved = z.float() - (low + 128)
    code_map = CodeMap(s.reciprocal(), -128, high - low - 128, zero=moved)
    values = x.detach().float()
    codes = run("quantize", Request(x.device.type), "auto", values, code_map, None).float()
    inside = torch.round(values * code_map.inverse) + moved
    inside = (inside >= code_map.low) & (inside <= code_map.high)
    finite = torch.isfinite(values)
    out: torch.Tensor = StraightThrough.apply(x, torch.where(finite, (codes - moved) * s, values), inside & finite)
    return out


def _parameter(
    value: torch.Tensor | float, name: str, shape: list[int], axis: int | None, x: torch.Tensor
) -> torch.Tensor:
    """Return a scale or zero point in the shape that broadcasts against ``x``."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.Tensor)):
        raise DtypeError(f"{name}={value!r}: must be a number or a tensor")
    given = torch.as_tensor(value, device=x.device)
    if given.dtype == torch.bool or given.is_complex():
        raise DtypeError(f"{name}: dtype {given.dtype} is not supported; must be real numbers")
    count = torch.Size(shape).numel()
    if given.numel() == 1:
        return given.reshape([1] * len(shape))
    if axis is None or given.dim() != 1 or given.numel() != count:
        legal = "one number" if axis is None else f"one number or {count}, one for each index along axis {axis}"
        raise ArgumentError(f"{name}: has shape {tuple(given.shape)}; must be {legal}")
    return given.reshape(shape)
