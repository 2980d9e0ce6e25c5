"""GELU in one native pass each way, which notes what the quantizers of the layers around it need."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from gradbits.kernels.native import gelu as native
from gradbits.nn.norm import FLAG
from gradbits.nn.watched import why_unfused
from gradbits.quantizers.known import note_width

LEAST = 1 << 18  # elements from which on one pass was measured to be faster, see benchmarks/fused_gelu.py


class GELUFunction(torch.autograd.Function):
    """``x Φ(x)``, or its approximation by tanh."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, approximate: str) -> torch.Tensor:
        """Compute the output; keep the input."""
        y, widest = native.gelu(x, approximate)
        note_width(y, widest)
        ctx.save_for_backward(x)
        ctx.approximate = approximate
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Compute the gradient of the input."""
        (x,), (g,) = ctx.saved_tensors, grads
        if (g.dtype, g.stride()) != (x.dtype, x.stride()):
            g = torch.empty_like(x).copy_(g)
        grad, widest = native.gelu(x, ctx.approximate, g)
        note_width(grad, widest)
        return grad, None


class FusedGELU(nn.GELU):
    r"""``torch.nn.GELU`` as ``fuse_`` makes it.

    .. math:: y = x\,\Phi(x)

    Where the native kernels compute it, the largest magnitudes of output and gradient, which set the scales of the
    layers around it, are found on the way. Results are equal up to the rounding of float32.

    >>> FusedGELU()(torch.tensor([0.0, 9.0])).tolist()
    [0.0, 9.0]
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return GELU of ``input``."""
        if why_not_fused(input, self.approximate) is not None:
            return super().forward(input)
        self.__dict__[FLAG] = "used"
        y: torch.Tensor = GELUFunction.apply(input, self.approximate)
        return y


def why_not_fused(x: torch.Tensor, approximate: str) -> str | None:
    """Return why PyTorch computes GELU of ``x``, or None."""
    reason = why_unfused()
    if reason is not None:
        return reason
    if x.numel() < LEAST:
        return f"{x.numel()} elements are too few to gain by it"
    if x.dtype == torch.bfloat16 and approximate == "none":
        return "in bfloat16 PyTorch's own was measured to be faster"
    return native.why_not(x)
