"""Fake quantization whose scale and zero point are learned."""

from __future__ import annotations

from typing import Any

import torch

from gradbits.core.checks import check_axis, check_float_tensor, check_integer, check_number
from gradbits.core.errors import ArgumentError


class LearnedAffine(torch.autograd.Function):
    """See ``fake_quantize_learned``."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, low: int, high: int, factor: float
    ) -> torch.Tensor:
        """Return the quantized values; ``scale`` and ``zero`` broadcast against ``x``."""
        whole = torch.round(zero).clamp(low, high)
        code = torch.round(x.float() * scale.float().reciprocal()) + whole
        ctx.save_for_backward(x, scale, code, whole)
        ctx.low, ctx.high, ctx.factor = low, high, factor
        return ((code.clamp(low, high) - whole) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of values, scale and zero point."""
        x, scale, code, whole = ctx.saved_tensors
        grad, inside = grads[0].float(), (code >= ctx.low) & (code <= ctx.high)
        kept = code.clamp(ctx.low, ctx.high) - whole
        slope = torch.where(inside, kept - x.float() / scale, kept)
        shift = torch.where(inside, torch.zeros_like(grad), -scale.float().expand_as(grad))

        def total(value: torch.Tensor) -> torch.Tensor:
            return ((grad * value).sum_to_size(scale.shape) * ctx.factor).to(scale.dtype)

        return (grad * inside).to(x.dtype), total(slope), total(shift), None, None, None


def fake_quantize_learned(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    low: int,
    high: int,
    *,
    axis: int | None = None,
    factor: float = 1.0,
) -> torch.Tensor:
    r"""Return ``x`` on a grid whose scale and zero point get gradients.

    .. math:: \frac{\partial \hat x}{\partial s} = \begin{cases} q_\min - Z & q < q_\min \\ q_\max - Z & q > q_\max \\
              (q - Z) - x/s & \text{otherwise} \end{cases} \qquad
              \frac{\partial \hat x}{\partial Z} = \begin{cases} 0 & q_\min \le q \le q_\max \\ -s & \text{otherwise}
              \end{cases}

    with q = round(x/s) + Z; the gradient of x passes where q is legal.

    Args:
        x: floating-point values.
        scale: positive ``s``; one element, or with ``axis`` one for each index along it.
        zero_point: ``Z`` in the shape of ``scale``, as floats; rounded and clipped to legal codes where it is used.
        low, high: the legal codes.
        axis: along which scale and zero point vary, or None.
        factor: what the gradients of scale and zero point are multiplied with, as :math:`1/\sqrt{n\,q_\max}` in LSQ.

    Raises:
        DtypeError: not floating-point tensors.
        ArgumentError: shapes or codes that do not fit.

    References:
        Bhalgat et al., LSQ+: Improving Low-bit Quantization through Learnable Offsets and Better Initialization, 2020,
        arXiv:2004.09576.

    >>> x, s, z = torch.tensor([0.3, 9.0]), torch.tensor([0.5], requires_grad=True), torch.tensor([0.0])
    >>> fake_quantize_learned(x, s, z, 0, 7).sum().backward(); round(s.grad.item(), 4)  # (1 - 0.6) + 7
    7.4
    """
    check_float_tensor(x, "x")
    check_float_tensor(scale, "scale")
    check_float_tensor(zero_point, "zero_point")
    check_integer(low, "low", -(1 << 31), (1 << 31) - 2)
    check_integer(high, "high", low + 1, (1 << 31) - 1)
    check_number(factor, "factor", 0.0)
    shape = [1] * x.dim()
    if axis is not None:
        axis = check_axis(axis, "axis", x.dim())
        shape[axis] = x.shape[axis]
    count = torch.Size(shape).numel()
    for name, value in (("scale", scale), ("zero_point", zero_point)):
        if value.numel() != count:
            raise ArgumentError(f"{name}: has shape {tuple(value.shape)}; must have {count} elements")
    if not bool((scale > 0).all()):
        raise ArgumentError(f"scale={scale.tolist()!r}: must be positive")
    parameters = (scale.reshape(shape), zero_point.reshape(shape))
    out: torch.Tensor = LearnedAffine.apply(x, *parameters, low, high, float(factor))
    return out
