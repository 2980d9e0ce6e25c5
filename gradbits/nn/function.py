"""The one autograd function behind every quantized layer: three products, each in integers or in float."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from gradbits.core.errors import DoubleBackwardError, NonFiniteError
from gradbits.core.noise import NoiseKey
from gradbits.core.qtensor import QTensor
from gradbits.nn.bilinear import Bilinear
from gradbits.quantizers.quantizer import Quantizer
from gradbits.quantizers.ranges import State
from gradbits.recipes.recipe import Recipe

ON_NONFINITE = ("propagate", "raise", "skip")
# one stream per use: no two uses of a layer's tensors share noise
STREAMS = {
    ("output", "input"): 0,
    ("output", "weight"): 1,
    ("grad_input", "gradient"): 2,
    ("grad_input", "weight"): 3,
    ("grad_weight", "gradient"): 4,
    ("grad_weight", "input"): 5,
}


@dataclass(frozen=True)
class Call:
    """Everything one call of a layer needs besides its tensors.

    Args:
        products: the layer's three products.
        recipe: which quantizer serves which operand.
        state_of: returns the state of an operand's quantizer.
        compute: ``"auto"``, ``"integer"`` or ``"simulate"``.
        seed: seed of this call's noise.
        update: whether range states may change.
        on_nonfinite: what to do with NaN and Inf.
        name: the layer's name, for messages.
        dtype: dtype of the output.
    """

    products: Bilinear
    recipe: Recipe
    state_of: Callable[[str, str], State]
    compute: str
    seed: int
    update: bool
    on_nonfinite: str
    name: str
    dtype: torch.dtype

    def quantize(
        self, product: str, role: str, value: torch.Tensor, update: bool
    ) -> tuple[QTensor, torch.Tensor | None]:
        """Return an operand's codes, and where its gradient passes (None: everywhere)."""
        q = quantizer_of(self.recipe, product, role)
        grain = self.products.grain(role, q.grain)
        q = q if grain is q.grain else replace(q, grain=grain)
        key = NoiseKey.of(self.seed, STREAMS[product, role]) if q.is_stochastic else None
        state = self.state_of(product, role)
        codes, low, high = q.quantize_with_range(value, noise=key, state=state, update=update, compute=self.compute)
        if self.on_nonfinite == "raise" and not bool(torch.isfinite(codes.scale).all()):
            raise NonFiniteError(f"{role} of layer {self.name!r} holds NaN or Inf (on_nonfinite='raise')")
        mask = q.estimator.mask(value, low, high) if role != "gradient" and q.range.can_clip else None
        return codes, mask


def quantizer_of(recipe: Recipe, product: str, role: str) -> Quantizer:
    """Return the quantizer of an operand."""
    found: Quantizer = getattr(getattr(recipe, product), role)
    return found


class Saver:
    """Packs QTensors into what autograd saves, and back: tensors and their meaning apart."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []

    def add(self, q: QTensor | torch.Tensor | None) -> Any:
        """Store a value's tensors; return the recipe to rebuild it."""
        if q is None or isinstance(q, torch.Tensor):
            return self._put(q)
        return (replace_tensors(q), *(self._put(t) for t in (q.codes, q.scale, q.zero_point, q.offset)))

    def _put(self, tensor: torch.Tensor | None) -> int | None:
        if tensor is None:
            return None
        for index, known in enumerate(self.tensors):
            if known is tensor:
                return index
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    @staticmethod
    def get(saved: tuple[torch.Tensor, ...], handle: Any) -> Any:
        """Return the value that ``add`` described by ``handle``."""
        if handle is None or isinstance(handle, int):
            return None if handle is None else saved[handle]
        blank, *indices = handle
        codes, scale, zero_point, offset = (None if i is None else saved[i] for i in indices)
        return replace(blank, codes=codes, scale=scale, zero_point=zero_point, offset=offset)


def replace_tensors(q: QTensor) -> QTensor:
    """Return ``q`` without its tensors: what is left may live on the autograd context."""
    nothing = torch.empty(0, dtype=torch.int8)
    return replace(q, codes=nothing, scale=nothing, zero_point=None, offset=None)


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
            ctx.input = saver.add(_operand(call, "grad_weight", "input", x, used_x))
        if needs_x:
            ctx.weight = saver.add(_operand(call, "grad_input", "weight", weight, used_w))
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
    return call.products.product(product, codes, operand, dtype=dtype, compute=call.compute), codes
