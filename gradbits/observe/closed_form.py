"""The variance of a backward product in closed form: what it is for given values, and what it is at most."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from gradbits.core.qtensor import QTensor
from gradbits.nn.call import Call, quantizer_of

PARTNER = {"grad_input": "weight", "grad_weight": "input"}


@dataclass(frozen=True)
class ClosedForm:
    """The sum of the variances of all elements of a backward product.

    Args:
        predicted: for these values, from where they fall between two codes.
        bound: wherever they fall: every element rounded from the middle between two codes.
    """

    predicted: float
    bound: float


def rounding_variance(q: QTensor, x: torch.Tensor, levels: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Return the variance that stochastic rounding gives each element before the rotation is undone, and its bound.

    .. math:: \mathrm{Var} = s^2 f (1 - f) \le s^2/4

    with f the fractional part of the value in steps; 0 where the value is outside the grid. Both are multiplied by the
    squared column norms of the inverse rotation, so that their sum is that of the rotated values.

    Args:
        q: codes of ``x``, rounded stochastically.
        x: the values.
        levels: lowest and highest code.
    """
    x = x.float() if q.rotation is None else q.rotation.forward(x.float())
    *upper, last = (replace(digit.unpack(), rotation=None) for digit in q.digits())
    left = x.double() - sum((digit.dequantize(torch.float32).double() for digit in upper), torch.zeros(()))
    scale = last.grain.expand(last.scale, last.shape).double()
    zero = last.zero_value()
    offset = 0.0 if zero is None else last.grain.expand(zero, last.shape).double()
    t = torch.where(scale > 0, (left - offset) / torch.where(scale > 0, scale, 1.0), 0.0)
    f = t - torch.floor(t)
    norms = 1.0 if q.rotation is None else q.rotation.column_norms(x).double()
    inside = (t >= levels[0]) & (t <= levels[1])  # beyond the last code the value is clipped, not rounded
    variance = torch.where(inside, f * (1.0 - f), 0.0) * scale.square() * norms
    return variance, (scale.square() * norms / 4).expand(variance.shape)


def product_variance(call: Call, product: str, g: torch.Tensor, other: torch.Tensor) -> ClosedForm:
    r"""Return the variance of a quantized backward product of a gradient, summed over its elements.

    Rounding errors of different elements are independent, so the variances go through the product with the squares of
    the other operand: :math:`\sum \mathrm{Var}(\hat G)\cdot\hat W^2`. Sampled rows add
    :math:`\sum_i \tfrac{1-p_i}{p_i}\,|Z_i|^2|\hat X_i|^2`, for one draw of the digits. A mask behind the product (a
    clipped operand) lowers the true variance below this.

    Args:
        call: the layer's call.
        product: ``"grad_input"`` or ``"grad_weight"``.
        g: gradient of the output.
        other: the forward operand that it is multiplied with.
    """
    spec = getattr(call.recipe, product)
    if spec is None:
        return ClosedForm(0.0, 0.0)
    q, _ = call.quantize(product, "gradient", g, False)
    operand, _ = call.quantize(product, PARTNER[product], other, False)
    squares = operand.dequantize(torch.float32).double().square()

    def through(variance: torch.Tensor) -> float:
        return float(call.products.in_float(product, variance, squares).sum())

    predicted = bound = 0.0
    quantizer = quantizer_of(call.recipe, product, "gradient")
    if quantizer.is_stochastic:
        predicted, bound = (through(v) for v in rounding_variance(q, g, quantizer.grid.levels))
    if spec.sampling is not None:
        extra = _sampling_variance(call, product, q, operand)
        predicted, bound = predicted + extra, bound + extra
    return ClosedForm(predicted, bound)


def _sampling_variance(call: Call, product: str, q: QTensor, operand: QTensor) -> float:
    spec, by_row = getattr(call.recipe, product), product == "grad_input"
    digits = q.digits()
    p = spec.sampling.probabilities(spec.sampling.scores(digits, None if by_row else operand), few=not by_row)
    dense = operand.dequantize(torch.float32).double()
    total = 0.0
    for digit, chance in zip(digits, p.chunk(len(digits)), strict=True):
        weight = torch.where(chance > 0, (1.0 - chance) / chance.clamp(min=1e-300), 0.0)
        z = replace(digit, rotation=None).dequantize(torch.float32).double()
        if by_row:
            if digit.rotation is not None:
                weight = weight * digit.rotation.column_norms(z).double().flatten()
            part = call.products.in_float(product, z, dense)
            total += float((part.flatten(1).square().sum(1) * weight).sum())
        else:
            total += float((_row_products(call, product, z, dense) * weight).sum())
    return total


def _row_products(call: Call, product: str, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the squared norm of each row's own contribution to ``grad_weight``."""
    if z.dim() == 2:
        return z.square().sum(1) * x.square().sum(1)
    rows = [call.products.in_float(product, z[i : i + 1], x[i : i + 1]).square().sum() for i in range(len(z))]
    return torch.stack(rows) if rows else z.new_zeros(0)
