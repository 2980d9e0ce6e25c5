"""Attention whose products multiply integers, forward and backward."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradbits.core.checks import check_float_tensor
from gradbits.core.errors import ArgumentError, DoubleBackwardError, NonFiniteError, UnsupportedError
from gradbits.core.noise import NoiseKey, draw_seed
from gradbits.kernels.attention import Attending, empty_output, rounded
from gradbits.kernels.dispatch import INT32_TERMS, Kernel, Request, choose
from gradbits.nn.assigned import Assigned
from gradbits.nn.attention import ScaledDotProductAttention
from gradbits.nn.call import STREAMS, without_autocast
from gradbits.nn.compiled import call
from gradbits.nn.refuse import refuse_transforms
from gradbits.nn.saved import Kept, keep_as

NAMES = ("query", "key", "value")


@dataclass(frozen=True)
class AttentionCall:
    """Everything one call of quantized attention needs besides its tensors.

    Args:
        how: what is computed.
        forward, backward: the kernels.
        seed: seed of this call's noise.
        on_nonfinite: what to do with NaN and Inf.
        name: the layer's name, for messages.
    """

    how: Attending
    forward: Kernel
    backward: Kernel
    seed: int
    on_nonfinite: str
    name: str


class AttentionFunction(torch.autograd.Function):
    """Attention in 8 bits, see ``gradbits.kernels.attention``."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall
    ) -> torch.Tensor:
        """Compute the output; keep codes for the backward pass."""
        found: Any = call.forward.run(query, key, value, call.how)
        if call.on_nonfinite == "raise" and not bool(torch.isfinite(found.scales).all()):
            raise NonFiniteError(f"an operand of layer {call.name!r} holds NaN or Inf (on_nonfinite='raise')")
        for codes in found.saved[:3]:
            keep_as(codes, Kept())
        ctx.save_for_backward(*found.saved)
        ctx.call = call
        output: torch.Tensor = found.output
        return output.detach()  # no view, so that it can be changed in place

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        """Refuse forward-mode differentiation.

        Raises:
            UnsupportedError: always; codes have no derivative.
        """
        raise UnsupportedError(f"layer {ctx.call.name!r} is quantized and has no forward-mode derivative")

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Compute the gradients.

        Raises:
            DoubleBackwardError: with ``create_graph=True``; codes have no derivative.
            NonFiniteError: the gradient is not finite and the policy is to raise.
        """
        call, g = ctx.call, grads[0]
        if torch.is_grad_enabled():
            raise DoubleBackwardError(
                f"layer {call.name!r} is quantized and cannot be differentiated twice (create_graph=True); "
                "use a float model where second derivatives are needed"
            )
        if call.on_nonfinite != "propagate" and not bool(torch.isfinite(g).all()):
            if call.on_nonfinite == "raise":
                raise NonFiniteError(f"gradient of layer {call.name!r} holds NaN or Inf (on_nonfinite='raise')")
            warnings.warn(
                f"gradient of layer {call.name!r} holds NaN or Inf; its gradients are zero in this step",
                RuntimeWarning,
                stacklevel=2,
            )
            g = torch.zeros_like(g)
        noise = tuple(NoiseKey.of(call.seed, STREAMS[product, "gradient"]) for product in ("grad_input", "grad_weight"))
        with without_autocast(g.device.type):
            found: Any = call.backward.run(g, ctx.saved_tensors, call.how, noise)
        return *(x if needed else None for x, needed in zip(found, ctx.needs_input_grad, strict=False)), None


class QuantizedAttention(Assigned, ScaledDotProductAttention):
    """``ScaledDotProductAttention`` with products of integers, forward and backward."""

    float_class = ScaledDotProductAttention

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return [..., L, V] for [..., L, E], [..., S, E] and [..., S, V]."""
        return call(self, query, key, value)

    def kernel(self, op: str, device: str, keys: int = 0) -> Kernel:
        """Return the kernel of ``attention`` or ``attention_gradients``."""
        return choose(op, Request(device, keys), self.assignment.compute)

    def compute(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return the output for operands as the caller has them."""
        a, operands, device = self.assignment, (query, key, value), query.device.type
        for name, x in zip(NAMES, operands, strict=True):
            refuse_transforms(a.name, x)
            check_float_tensor(x, name)
            if x.dim() < 2:
                raise ArgumentError(f"{name}: shape {tuple(x.shape)} of layer {a.name!r} must be [..., length, width]")
        if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
            shapes = ", ".join(str(tuple(x.shape)) for x in operands)
            raise ArgumentError(f"query, key, value: shapes {shapes} of layer {a.name!r} do not fit together")
        if max(key.shape[-2], key.shape[-1], value.shape[-1]) > INT32_TERMS:
            shapes = f"{tuple(key.shape)} and {tuple(value.shape)}"
            raise ArgumentError(
                f"key, value: shapes {shapes} of layer {a.name!r}; a sum in int32 has at most {INT32_TERMS} terms"
            )
        dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        if a.seen is not None:
            with sdpa_kernel(SDPBackend.MATH):  # the one that can be differentiated twice
                return super().forward(*(x.to(dtype) + (rounded(x) - x).detach().to(dtype) for x in operands))
        lead, like = self._lead(*operands), self.like_output(*operands)
        if 0 in (*lead, query.shape[-2], *key.shape[-2:], value.shape[-1]):
            nothing = super().forward(*(x.to(dtype).expand(*lead, *x.shape[-2:]) for x in operands))
            return torch.empty_like(like, dtype=dtype).copy_(nothing)
        grouped = [_in_heads(x.to(dtype), lead) for x in operands]
        given = AttentionCall(
            how=Attending(self.causal, query.shape[-1] ** -0.5 if self.scale is None else float(self.scale)),
            forward=self.kernel("attention", device, key.shape[-2]),
            backward=self.kernel("attention_gradients", device, key.shape[-2]),
            # reentrant checkpointing runs the first forward without gradients: it must draw as the second will
            seed=draw_seed() if self.training or torch.is_grad_enabled() else 0,
            on_nonfinite=a.on_nonfinite,
            name=a.name,
        )
        with without_autocast(device):
            y: torch.Tensor = AttentionFunction.apply(*grouped, given)
        return y if len(lead) == 2 else y.reshape(like.shape)

    def like_output(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the shape and memory order of the output."""
        lead = self._lead(query, key, value)
        if len(lead) != 2:
            return query.new_empty(*lead, query.shape[-2], value.shape[-1])
        return empty_output(query.new_empty(()).expand(*lead, *query.shape[-2:]), value.shape[-1])

    def _lead(self, *operands: torch.Tensor) -> torch.Size:
        """Return the leading axes of the output."""
        try:
            return torch.broadcast_shapes(*(x.shape[:-2] for x in operands))
        except RuntimeError:
            shapes = ", ".join(str(tuple(x.shape)) for x in operands)
            raise ArgumentError(
                f"query, key, value: leading axes of shapes {shapes} of layer {self.assignment.name!r} do not broadcast"
            ) from None


def _in_heads(x: torch.Tensor, lead: torch.Size) -> torch.Tensor:
    """Return an operand as [batch, heads, length, width], its leading axes those of all operands."""
    x = x.expand(*lead, *x.shape[-2:])
    return x if len(lead) == 2 else x.reshape(lead.numel(), 1, *x.shape[-2:])
