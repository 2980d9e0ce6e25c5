"""The one autograd function behind every quantized layer: three products, each in integers or in float."""

from __future__ import annotations

import math
import warnings
from typing import Any
from weakref import ref

import torch

from gradbits.core.errors import DoubleBackwardError, UnsupportedError
from gradbits.core.packing import packed_width
from gradbits.core.qtensor import QTensor
from gradbits.kernels.activations import activate
from gradbits.nn.call import ON_NONFINITE, Call, quantizer_of, without_autocast
from gradbits.nn.passage import Passage
from gradbits.nn.sampling import sampled_product
from gradbits.nn.saved import Kept, Saver, keep_as
from gradbits.quantizers.known import alias

__all__ = ["ON_NONFINITE", "Call", "QuantizedProduct"]

Value = QTensor | torch.Tensor
# the product that gives a forward operand's gradient, and the operand it is multiplied with
BACKWARD = {"input": ("grad_input", "weight"), "weight": ("grad_weight", "input")}


class QuantizedProduct(torch.autograd.Function):
    """``output`` in the forward pass, ``grad_input`` and ``grad_weight`` in the backward pass.

    ``learned`` are the parameters that ``call.learned`` names: steps of the forward operands' quantizers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        call: Call,
        *learned: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the output; keep codes, not floats, for the backward pass."""
        products = call.products
        values: dict[str, torch.Tensor] = {"input": x, "weight": weight}
        used: dict[str, Value] = dict(values)
        passages: dict[str, Passage | None] = {"input": None, "weight": None}
        if call.recipe.output is not None:
            for role, (codes, mask) in call.quantize_forward(values).items():
                used[role] = codes
                learns = call.quantizer("output", role).estimator.learns
                if learns or mask is not None:
                    passages[role] = Passage(codes.rotation, mask, values[role] if learns else None)
            qx, qw = used["input"], used["weight"]
            assert isinstance(qx, QTensor)
            assert isinstance(qw, QTensor)
            y = products.product(
                "output", qx, qw, bias=bias, dtype=call.dtype, compute=call.compute, activation=call.activation
            )
        else:
            y = products.in_float("output", x.to(call.dtype), weight.to(call.dtype))
            if bias is not None:
                y = y + products.bias_for_output(bias.to(call.dtype), y.dim())
            y = activate(y, call.activation)
        needs = dict(zip(values, ctx.needs_input_grad[:2], strict=True))
        for (role, _), needed in zip(call.learned, ctx.needs_input_grad[4:], strict=True):
            needs[role] = needs[role] or needed
        saver = Saver()
        ctx.kept = {}
        for role, (product, other) in BACKWARD.items():
            if needs[role]:
                operand = _packed(_operand(call, product, other, values[other], used[other]))
                if isinstance(operand, QTensor) and not operand.is_packed:
                    keep_as(operand.codes, _kept(call, product, other, values[other], operand, used[other] is operand))
                ctx.kept[role] = (saver.add(operand), saver.add(passages[role]))
        ctx.save_for_backward(*saver.tensors)
        ctx.call = call
        ctx.like = {role: (value.shape, value.dtype) for role, value in values.items()}
        ctx.plain = x.is_contiguous()
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y.detach() if y._is_view() else y  # a view could not be changed in place

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        """Refuse forward-mode differentiation.

        Raises:
            UnsupportedError: always; codes have no derivative.
        """
        raise UnsupportedError(
            f"layer {ctx.call.name!r} is quantized and has no forward-mode derivative; use backward() or "
            "torch.autograd.grad"
        )

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
        g = alias(grads[0])  # what is noted on it ends with this call
        saved = ctx.saved_tensors
        if call.on_nonfinite == "skip" and not math.isfinite(float(g.sum())) and not bool(torch.isfinite(g).all()):
            warnings.warn(
                f"gradient of layer {call.name!r} holds NaN or Inf; its gradients are zero in this step",
                RuntimeWarning,
                stacklevel=2,
            )
            return _zeros(ctx, g)
        found: dict[str, torch.Tensor] = {}
        learned: dict[tuple[str, str], torch.Tensor] = {}
        codes: QTensor | None = None
        with without_autocast(g.device.type):
            bias = call.bias_gradient(g).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
            for role, (operand, passage) in ctx.kept.items():
                shape, dtype = ctx.like[role]
                found[role], codes, steps = _backward_product(
                    call, role, g, Saver.get(saved, operand), codes, Saver.get(saved, passage), shape, dtype
                )
                learned.update({(role, name): grad for name, grad in steps.items()})
            if ctx.plain and "input" in found:  # what comes next is slow on operands in different memory orders
                found["input"] = found["input"].contiguous()
        needed = ctx.needs_input_grad
        inputs = (found.get(role) if need else None for role, need in zip(BACKWARD, needed, strict=False))
        return *inputs, bias, None, *(learned.get(key) for key in call.learned)


def _zeros(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Return zero gradients, whatever the operands hold; what is learned gets none and stays as it is."""
    likes = zip(ctx.like.values(), ctx.needs_input_grad, strict=False)
    operands = (torch.zeros(shape, dtype=dtype, device=g.device) if need else None for (shape, dtype), need in likes)
    bias = ctx.call.products.bias_gradient(torch.zeros_like(g)).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
    return *operands, bias, None, *(None for _ in ctx.call.learned)


def _packed(value: Value) -> Value:
    """Return codes as small as they may be kept."""
    return value.pack() if isinstance(value, QTensor) and packed_width(value.bits) < 8 else value


def _kept(call: Call, product: str, role: str, value: torch.Tensor, codes: QTensor, forward: bool) -> Kept:
    """Return how an operand's codes may be kept: those of a parameter are as good computed again.

    Args:
        call: the layer's call.
        product: that they were saved for.
        role: the operand.
        value: it, before it was quantized.
        codes: it, afterwards.
        forward: whether its codes are those of ``output``.
    """
    q = call.quantizer("output" if forward else product, role)
    if not value.is_leaf or not value.requires_grad or q.init_state(1) or codes.rest is not None:
        keeps_signs = all(part is None for part in (codes.zero_point, codes.offset, codes.rest, codes.rotation))
        return Kept(signs_of=ref(value)) if keeps_signs else Kept()
    version = value._version

    def again() -> torch.Tensor:
        if value._version != version:
            raise RuntimeError(f"{role} of layer {call.name!r} was changed in place between forward and backward pass")
        return call.quantize("output" if forward else product, role, value, False)[0].codes

    return Kept(again)


def _operand(call: Call, product: str, role: str, value: torch.Tensor, used: Value) -> Value:
    """Return what ``product`` needs of a forward operand: the forward's codes wherever they serve."""
    if getattr(call.recipe, product) is None:
        return used
    wanted = quantizer_of(call.recipe, product, role)
    if call.recipe.output is not None and wanted == quantizer_of(call.recipe, "output", role):
        return used
    return call.quantize(product, role, value, call.update)[0]


def _backward_product(
    call: Call,
    role: str,
    g: torch.Tensor,
    operand: Value,
    known: QTensor | None,
    passage: Passage | None,
    shape: torch.Size,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, QTensor | None, dict[str, torch.Tensor]]:
    """Return the gradient of a forward operand, the gradient's codes, and the gradients of the operand's steps.

    Args:
        call: the layer's call.
        role: the forward operand whose gradient is wanted.
        g: gradient of the output.
        operand: what it is multiplied with.
        known: the gradient's codes from the other backward product.
        passage: how the gradient passes the operand's quantizer.
        shape, dtype: of the operand.
    """
    (product, other), recipe, products = BACKWARD[role], call.recipe, call.products
    spec = getattr(recipe, product)
    rotated = False
    codes: QTensor | None = None
    if spec is None or not isinstance(operand, QTensor):
        wide = torch.promote_types(g.dtype, dtype)
        dense = operand.dequantize(wide) if isinstance(operand, QTensor) else operand.to(wide)
        grad = products.in_float(product, g.to(wide), dense)
    else:
        operand = operand.unpack()
        shared = known is not None and recipe.share_gradient and recipe.grad_input is not None
        same = shared and recipe.grad_input is not None and spec.gradient == recipe.grad_input.gradient
        codes = known if same and known is not None else call.quantize(product, "gradient", g, call.training)[0]
        rotated = passage is not None and passage.shares_rotation(operand)
        keep = (other,) if rotated else ()
        inside = torch.float32 if passage is not None else dtype
        if spec.sampling is None:
            grad = products.product(product, codes, operand, dtype=inside, compute=call.compute, keep=keep)
        else:
            rule, noise, compute = spec.sampling, call.key(product, "sampling"), call.compute
            grad = sampled_product(
                products, product, codes, operand, shape, rule=rule, noise=noise, compute=compute, keep=keep
            )
    steps: dict[str, torch.Tensor] = {}
    if passage is not None:
        grad, steps = passage.back(call, role, grad, rotated)
    return grad.to(dtype), codes, steps
