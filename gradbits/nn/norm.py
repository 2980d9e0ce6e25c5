"""Batch norm, the shortcut that is added and the ReLU behind it, in one pass over memory where PyTorch makes three."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from gradbits.kernels.native import norm as native
from gradbits.nn.watched import is_watched, why_unfused
from gradbits.quantizers.known import note_width

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
LEAST = 1 << 19  # elements from which on one pass was measured to be faster, see benchmarks/fused_norm.py
FLAG = "_gradbits_fused"  # on a module: "wanted" by fuse_, "used" once it was computed in one pass


class NormReLU(torch.autograd.Function):
    """``relu((x - mean) * inverse * weight + bias + residual)``; the batch's own statistics have gradients too."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        statistics: torch.Tensor,
        eps: float | None,
    ) -> torch.Tensor:
        """Compute the output; keep the input and which outputs are positive.

        ``statistics`` [3, C] are mean, inverse of the deviation and variance: with ``eps`` written for the batch, with
        None given.
        """
        y, mask, widest = native.forward(x, weight, bias, residual, statistics, eps)
        note_width(y, widest)
        ctx.save_for_backward(x, weight, statistics, mask)
        ctx.of_batch, ctx.has_bias, ctx.has_residual = eps is not None, bias is not None, residual is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Compute the gradients of input, weight, bias and residual."""
        x, weight, statistics, mask = ctx.saved_tensors
        x, mask, g = (_channels_last(t) for t in (x, mask, grads[0].to(x.dtype)))
        grad, rest, (grad_bias, grad_weight), widest = native.backward(
            g, x, mask, weight, statistics, ctx.of_batch, ctx.has_residual
        )
        note_width(grad, widest)
        return (
            grad, None if weight is None else grad_weight, grad_bias if ctx.has_bias else None, rest, None, None
        )  # fmt: skip


def norm_relu(norm: nn.Module, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    r"""Return ``relu(norm(x) + residual)``; after ``fuse_`` in one pass.

    .. math:: y = \max\Big(0,\ \gamma\,\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta + r\Big)

    One pass is taken by the native kernels for batch norms on the processor with channels last in memory and at least
    ``LEAST`` elements, from which on it is faster; everything else is computed as it is written. The results are equal
    up to the rounding of float32.

    Args:
        norm: any module; a batch norm can be fused.
        x: [N, C, *].
        residual: like ``x``, or None.

    >>> norm_relu(nn.BatchNorm2d(2), torch.zeros(4, 2, 3, 3)).shape
    torch.Size([4, 2, 3, 3])
    """
    y = run_fused(norm, x, residual)
    if y is not None:
        return y
    plain = norm(x)
    return F.relu(plain if residual is None else plain + residual)


def run_fused(norm: nn.Module, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor | None:
    """Return ``relu(norm(x) + residual)`` in one pass, or None where it is to be computed as it is written."""
    if norm.__dict__.get(FLAG) is None or why_not_fused(norm, x, residual) is not None:
        return None
    norm.__dict__[FLAG] = "used"
    return _fused(norm, x, residual)


def why_not_fused(norm: nn.Module, x: torch.Tensor, residual: torch.Tensor | None = None) -> str | None:
    """Return why a norm and what follows it are computed one after the other, or None."""
    reason = why_unfused()
    if reason is not None:
        return reason
    if type(norm) not in NORMS:
        return f"{type(norm).__name__} is no batch norm that computes what its name says"
    if is_watched(norm):
        return "hooks wait for the norm's own output"
    if any(p.dtype != torch.float32 for p in norm.parameters()):
        return "its parameters are not float32"
    if x.dim() < 2 or x.shape[1] != getattr(norm, "num_features", 0) or x.numel() <= x.shape[1]:
        return "the input does not fit it, or has a single value in a channel"
    if residual is not None and (residual.dtype, residual.shape, residual.stride()) != (x.dtype, x.shape, x.stride()):
        return "the residual differs from the input in dtype, shape or order"
    if x.numel() < LEAST:
        return f"{x.numel()} elements are too few to gain by it"
    return native.why_not(x)


def _fused(norm: Any, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    norm._check_input_dim(x)
    of_batch = norm.training or norm.running_mean is None
    statistics = torch.empty(3, x.shape[1])
    if not of_batch:
        inverse = (norm.running_var + norm.eps).rsqrt()
        torch.stack([norm.running_mean, inverse, norm.running_var], out=statistics)
    y: torch.Tensor = NormReLU.apply(x, norm.weight, norm.bias, residual, statistics, norm.eps if of_batch else None)
    if of_batch and norm.training and norm.track_running_stats and norm.running_mean is not None:
        _update_(norm, statistics[0], statistics[2], x.numel() // x.shape[1])
    return y


def _update_(norm: Any, mean: torch.Tensor, var: torch.Tensor, count: int) -> None:
    with torch.no_grad():
        share = norm.momentum
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            share = 1.0 / float(norm.num_batches_tracked) if share is None else share
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
        norm.running_var.lerp_((var * (count / (count - 1))).to(norm.running_var.dtype), share)


def _channels_last(t: torch.Tensor) -> torch.Tensor:
    turned = t.movedim(1, -1)
    return t if turned.is_contiguous() else turned.contiguous().movedim(-1, 1)
