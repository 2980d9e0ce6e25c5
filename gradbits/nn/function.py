"""The one autograd function behind every quantized layer: three products, each in integers or in float."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch

from gradbits.core.errors import DoubleBackwardError
from gradbits.core.packing import packed_width
from gradbits.core.qtensor import QTensor
from gradbits.nn.call import ON_NONFINITE, Call, quantizer_of
from gradbits.nn.saved import Saver

__all__ = ["ON_NONFINITE", "Call", "QuantizedProduct"]


def _packed(value: QTensor | torch.Tensor) -> QTensor | torch.Tensor:
    """Return codes as small as they may be kept."""
    return value.pack() if isinstance(value, QTensor) and packed_width(value.bits) < 8 else value


def _dense(value: QTensor | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return value.dequantize(dtype) if isinstance(value, QTensor) else value.to(dtype)


class QuantizedProduct(torch.autograd.Function):
    """``output`` in the forward pass, ``grad_input`` and ``grad_weight`` in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, call: Call
    ) -> torch.Tensor:
        """Compute the output; keep codes, not floats, for the backward pass."""
        recipe, products = call.recipe, call.products
        mask_x = mask_w = None
        used_x: QTensor | torch.Tensor = x
        used_w: QTensor | torch.Tensor = weight
        if recipe.output is not None:
            qx, mask_x = call.quantize("output", "input", x, call.update)
            qw, mask_w = call.quantize("output", "weight", weight, call.update)
            y = products.product("output", qx, qw, bias=bias, dtype=call.dtype, compute=call.compute)
            used_x, used_w = qx, qw
        else:
            y = products.in_float("output", x.to(call.dtype), weight.to(call.dtype))
            if bias is not None:
                y = y + products.bias_for_output(bias.to(call.dtype), y.dim())
        needs_x, needs_w = ctx.needs_input_grad[:2]
        saver = Saver()
        ctx.input = ctx.weight = None
        if needs_w:
            ctx.input = saver.add(_packed(_operand(call, "grad_weight", "input", x, used_x)))
        if needs_x:
            ctx.weight = saver.add(_packed(_operand(call, "grad_input", "weight", weight, used_w)))
        ctx.mask_x = saver.add(mask_x if needs_x else None)
        ctx.mask_w = saver.add(mask_w if needs_w else None)
        ctx.save_for_backward(*saver.tensors)
        ctx.call = call
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Compute the gradients that are needed.

        Raises:
            DoubleBackwardError: with ``create_graph=True``; codes have no derivative.
            NonFiniteError: the gradient is not finite and the policy is to raise.
        """
        call: Call = ctx.call
        if torch.is_grad_enabled():
            raise DoubleBackwardError(
                f"layer {call.name!r} is quantized and cannot be differentiated twice (create_graph=True); "
                "use a float model where second derivatives are needed"
            )
        (g,) = grads
        needs_x, needs_w, needs_b, _ = ctx.needs_input_grad
        saved = ctx.saved_tensors
        if call.on_nonfinite == "skip" and not math.isfinite(float(g.sum())) and not bool(torch.isfinite(g).all()):
            warnings.warn(
                f"gradient of layer {call.name!r} holds NaN or Inf; its gradients are zero in this step",
                RuntimeWarning,
                stacklevel=2,
            )
            g = torch.zeros_like(g)
        with torch.autocast(g.device.type, enabled=False):
            grad_x, qg = None, None
            if needs_x:
                operand = Saver.get(saved, ctx.weight)
                grad_x, qg = _backward_product(call, "grad_input", g, operand, None, ctx.dtypes[0])
                mask = Saver.get(saved, ctx.mask_x)
                grad_x = grad_x if mask is None else grad_x * mask
            grad_w = None
            if needs_w:
                operand = Saver.get(saved, ctx.input)
                grad_w, _ = _backward_product(call, "grad_weight", g, operand, qg, ctx.dtypes[1])
                mask = Saver.get(saved, ctx.mask_w)
                grad_w = grad_w if mask is None else grad_w * mask
            grad_b = call.products.bias_gradient(g).to(ctx.dtypes[2]) if needs_b else None
        return grad_x, grad_w, grad_b, None


def _operand(
    call: Call, product: str, role: str, value: torch.Tensor, used: QTensor | torch.Tensor
) -> QTensor | torch.Tensor:
    """Return what ``product`` needs of a forward operand: the forward's codes wherever they serve."""
    if getattr(call.recipe, product) is None:
        return used
    wanted = quantizer_of(call.recipe, product, role)
    if call.recipe.output is not None and wanted == quantizer_of(call.recipe, "output", role):
        return used
    return call.quantize(product, role, value, call.update)[0]


def _backward_product(
    call: Call, product: str, g: torch.Tensor, operand: QTensor | torch.Tensor, qg: QTensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, QTensor | None]:
    """Return a backward product, and the gradient's codes."""
    recipe = call.recipe
    if getattr(recipe, product) is None or not isinstance(operand, QTensor):
        wide = torch.promote_types(g.dtype, dtype)
        return call.products.in_float(product, g.to(wide), _dense(operand, wide)).to(dtype), None
    shared = (
        qg is not None
        and recipe.share_gradient
        and recipe.grad_input is not None
        and quantizer_of(recipe, product, "gradient") == recipe.grad_input.gradient
    )
    codes = qg if shared and qg is not None else call.quantize(product, "gradient", g, True)[0]
    return call.products.product(product, codes, operand.unpack(), dtype=dtype, compute=call.compute), codes
