"""The plain baseline: abs-max scales everywhere, stochastic gradients."""

from __future__ import annotations

from gradbits.core.grain import Grain, as_grain
from gradbits.quantizers.grids import Symmetric
from gradbits.quantizers.quantizer import Quantizer
from gradbits.recipes.recipe import GradInput, GradWeight, Output, Recipe
from gradbits.recipes.registry import published


@published(title="Dynamic abs-max scales, stochastically rounded gradients", unbiased=True)
def int8_dynamic(
    *,
    bits: int = 8,
    gradient_bits: int | None = None,
    rows: Grain | str = "tensor",
    share_gradient: bool = True,
    matmul: bool = True,
    attention: bool = True,
) -> Recipe:
    r"""Quantize every operand symmetrically over its own largest magnitude.

    .. math:: s = \max|x|/127, \qquad q = \mathrm{round}(x/s), \qquad q_g = \mathrm{round}(g/s_g + v)

    Weights and activations round to nearest, gradients stochastically, so both backward products are unbiased
    estimates of the gradients of the quantized forward pass.

    Args:
        bits: bits of weights and activations, and of gradients unless given.
        gradient_bits: bits of gradients.
        rows: ``"tensor"``, or ``"row"`` for one scale per token or sample in ``output`` and ``grad_input``.
            ``grad_weight`` sums over the rows and keeps one scale per tensor, so it rounds the input once more: it is
            then an unbiased estimate with that rounding of the input, not with the forward's.
        share_gradient: whether both backward products use one draw of gradient codes (with equal grains).
        matmul: whether attention products are quantized too.
        attention: whether fused attention is, in 8 bits whatever ``bits`` are.

    >>> int8_dynamic().grad_input.gradient.rounding
    'stochastic'
    """
    grid, gradient_grid = Symmetric(bits=bits), Symmetric(bits=bits if gradient_bits is None else gradient_bits)
    grain = as_grain(rows)
    plain = Quantizer(grid=grid)
    gradient = Quantizer(grid=gradient_grid, rounding="stochastic")
    by_row = Quantizer(grid=gradient_grid, grain=grain, rounding="stochastic")
    return Recipe(
        name="int8_dynamic",
        output=Output(input=Quantizer(grid=grid, grain=grain), weight=plain),
        grad_input=GradInput(gradient=by_row, weight=plain),
        grad_weight=GradWeight(gradient=gradient, input=plain),
        share_gradient=share_gradient,
        matmul=matmul,
        attention=attention,
    )
