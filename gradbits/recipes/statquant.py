r"""StatQuant: unbiased gradient quantizers of falling variance, per tensor (PTQ), per row (PSQ), per block (BHQ).

All three quantize a gradient G by an invertible S that acts on its rows, one row a sample or a token:

.. math:: Q_b(G) = S^{-1}\,\mathrm{SR}\big(S\,(G - z)\big) + z, \qquad \mathrm{Var}\,Q_b(G) \le \tfrac{D}{4}|S^{-1}|_F^2

with B = 2^b - 1 steps and stochastic rounding SR, so that the gradient stays unbiased whatever the bits:

* PTQ: S = B/R(G), one range R for the whole tensor;
* PSQ: S = diag(B/R(G_i)), a range for each row, never worse than PTQ;
* BHQ: S = diag(B/R((TG)_i)) T with a block Householder T that spreads a large row over the small ones.

``grad_input`` takes Q_b with ``gradient_bits``. ``grad_weight`` sums over the rows, so no scale may follow them: it
takes a second, per-tensor draw with ``grad_weight_bits`` (gradient bifurcation). Weights and activations have 8 bits,
affine, rounded to nearest; what the gradients estimate without bias is the gradient of that quantized forward pass.
"""

from __future__ import annotations

from gradbits.core.checks import check_choice
from gradbits.core.grain import PerChannel, PerRow, PerTensor
from gradbits.quantizers.grids import Affine
from gradbits.quantizers.householder import Householder
from gradbits.quantizers.quantizer import Quantizer
from gradbits.quantizers.ranges import MinMax
from gradbits.recipes.recipe import GradInput, GradWeight, Output, Recipe
from gradbits.recipes.registry import published

TITLE = "A Statistical Framework for Low-bitwidth Training of Deep Neural Networks"
PAPER = "arXiv:2010.14298 (NeurIPS 2020)"


def _recipe(
    name: str,
    gradient: Quantizer,
    *,
    bits: int,
    grad_weight_bits: int,
    grad_weight_grain: str,
    zero: str,
    matmul: bool | Recipe,
) -> Recipe:
    """Return the recipe that differs between the three methods in the gradient quantizer of ``grad_input`` only."""
    check_choice(grad_weight_grain, "grad_weight_grain", ("tensor", "channel"))
    activation = Quantizer(grid=Affine(bits=bits), range=MinMax())
    weight = Quantizer(grid=Affine(bits=bits, zero="widen"), range=MinMax())
    second = Quantizer(
        grid=Affine(bits=grad_weight_bits, zero=zero),
        range=MinMax(),
        grain=PerTensor() if grad_weight_grain == "tensor" else PerChannel(axis=1),
        rounding="stochastic",
    )
    return Recipe(
        name=name,
        output=Output(input=activation, weight=weight),
        grad_input=GradInput(gradient=gradient, weight=weight),
        grad_weight=GradWeight(gradient=second, input=activation),
        matmul=matmul,
    )


@published(title=f"{TITLE}: per-tensor quantizer", paper=PAPER, survey="StatQuant, FQT, PTQ", unbiased=True)
def statquant_ptq(
    *,
    gradient_bits: int = 8,
    bits: int = 8,
    grad_weight_bits: int = 8,
    grad_weight_grain: str = "tensor",
    zero: str = "none",
    matmul: bool = True,
) -> Recipe:
    r"""Quantize gradients with one range per tensor: :math:`S = B/R(G),\ \mathrm{Var} \le N D\,R(G)^2/(4B^2)`.

    Args:
        gradient_bits: b, bits of the gradient in ``grad_input``, 2 to 8.
        bits: of weights and activations.
        grad_weight_bits: bits of the gradient in ``grad_weight``.
        grad_weight_grain: ``"tensor"``, or ``"channel"`` for a range per output channel in ``grad_weight``.
        zero: of the gradient grids: ``"none"`` is the plain range of the definition above; ``"widen"`` puts real
            zero on a code as the authors' training code does, so that a gradient of exactly zero adds no variance.
        matmul: whether attention products are quantized too.

    References:
        Chen et al., NeurIPS 2020, arXiv:2010.14298.

    >>> statquant_ptq(gradient_bits=5).grad_input.gradient.grid
    Affine(bits=5, zero='none')
    """
    gradient = Quantizer(grid=Affine(bits=gradient_bits, zero=zero), range=MinMax(), rounding="stochastic")
    return _recipe(
        "statquant_ptq",
        gradient,
        bits=bits,
        grad_weight_bits=grad_weight_bits,
        grad_weight_grain=grad_weight_grain,
        zero=zero,
        matmul=matmul,
    )


@published(title=f"{TITLE}: per-sample quantizer", paper=PAPER, survey="StatQuant, FQT, PSQ", unbiased=True)
def statquant_psq(
    *,
    gradient_bits: int = 8,
    bits: int = 8,
    grad_weight_bits: int = 8,
    grad_weight_grain: str = "tensor",
    rows: str = "token",
    zero: str = "none",
    matmul: bool = True,
) -> Recipe:
    r"""Quantize gradients with a range per row: :math:`S = \mathrm{diag}(B/R(G_i)),\ \mathrm{Var} \le
    \tfrac{D}{4B^2}\sum_i R(G_i)^2`.

    For attention products (``gradbits.nn.Matmul``) a row is one matrix of the batch.

    Args:
        gradient_bits, bits, grad_weight_bits, grad_weight_grain, zero, matmul: as for ``statquant_ptq``.
        rows: ``"token"`` or ``"sample"``: what a row is where a linear layer sees sequences; for images it is the
            sample.

    References:
        Chen et al., NeurIPS 2020, arXiv:2010.14298.

    >>> statquant_psq().grad_input.gradient.grain
    PerRow(axis=0)
    """
    gradient = Quantizer(
        grid=Affine(bits=gradient_bits, zero=zero), range=MinMax(), grain=PerRow(), rounding="stochastic", rows=rows
    )
    return _recipe(
        "statquant_psq",
        gradient,
        bits=bits,
        grad_weight_bits=grad_weight_bits,
        grad_weight_grain=grad_weight_grain,
        zero=zero,
        matmul=matmul,
    )


@published(title=f"{TITLE}: block Householder quantizer", paper=PAPER, survey="StatQuant, FQT, BHQ", unbiased=True)
def statquant_bhq(
    *,
    gradient_bits: int = 5,
    bits: int = 8,
    grad_weight_bits: int = 8,
    grad_weight_grain: str = "tensor",
    rows: str = "token",
    fallback: bool = True,
    matmul: bool = True,
) -> Recipe:
    r"""Quantize gradients after a block Householder transform: :math:`S = \mathrm{diag}(B/R((TG)_i))\,T`.

    .. math:: \mathrm{Var} \le \tfrac{D}{4}\sum_i \big(R((TG)_i)/B\big)^2\,|T^{-1}_{:,i}|^2

    T leaves the integer product at its result, :math:`\hat G W = T^{-1}(\widehat{TG}\,W)`, at a few operations per
    element. Attention products have no rows that could be mixed; there ``matmul=True`` means ``statquant_psq``.

    Args:
        gradient_bits: b; 5, the paper's demonstration, by default.
        bits, grad_weight_bits, grad_weight_grain, matmul: as for ``statquant_ptq``.
        rows: as for ``statquant_psq``.
        fallback: whether blocks of rows whose variance bound the transform does not lower stay untransformed (PSQ).

    References:
        Chen et al., NeurIPS 2020, arXiv:2010.14298.

    >>> statquant_bhq().grad_input.gradient.rotation
    Householder(fallback=True)
    """
    gradient = Quantizer(
        grid=Affine(bits=gradient_bits),
        range=MinMax(),
        grain=PerRow(),
        rounding="stochastic",
        rotation=Householder(fallback=fallback),
        rows=rows,
    )
    attention = statquant_psq(gradient_bits=gradient_bits, bits=bits, grad_weight_bits=grad_weight_bits)
    return _recipe(
        "statquant_bhq",
        gradient,
        bits=bits,
        grad_weight_bits=grad_weight_bits,
        grad_weight_grain=grad_weight_grain,
        zero="none",
        matmul=attention if matmul is True else matmul,
    )
