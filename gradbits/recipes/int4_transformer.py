"""Training transformers with 4-bit integers: rotated 4-bit forward, two-digit gradients, sampled backward products."""

from __future__ import annotations

from gradbits.core.checks import check_choice, check_instance
from gradbits.quantizers.bit_split import BitSplit
from gradbits.quantizers.estimators import STE
from gradbits.quantizers.grids import TwosComplement
from gradbits.quantizers.hadamard import Hadamard
from gradbits.quantizers.leverage import Leverage
from gradbits.quantizers.lsq import LSQ, LearnedStep, MeanStep
from gradbits.quantizers.quantizer import Quantizer
from gradbits.quantizers.ranges import RangeRule
from gradbits.recipes.int8_dynamic import int8_dynamic
from gradbits.recipes.recipe import GradInput, GradWeight, Output, Recipe
from gradbits.recipes.registry import published


@published(
    title="Training Transformers with 4-bit Integers",
    paper="arXiv:2306.11987 (NeurIPS 2023)",
    survey="INT4 training, HQ-LSS",
    unbiased=True,
)
def int4_transformer(
    *,
    hadamard: int = 0,
    learned_steps: bool = True,
    sampling: bool = True,
    keep: float = 0.5,
    attention: str = "float",
    keep_float: tuple[str, ...] = (),
) -> Recipe:
    r"""Train in 4 bits: every product of linear layers and convolutions multiplies 4-bit integers.

    Forward (Hadamard quantizer, HQ, with learned steps, LSQ): outliers of a few features are spread over blocks by an
    orthogonal H that cancels in the product, then both operands take codes from -8 to 7:

    .. math:: Y = \widehat{XH}\,\widehat{WH}^\top, \qquad \hat x = s\,\mathrm{clamp}(\mathrm{round}(x/s), -8, 7)

    Backward: the gradient is two signed digits (bit splitting, BS), rows of which are drawn by leverage score (LSS):

    .. math:: \hat G = \Delta\,(14\,\mathrm{hi} + \mathrm{lo}), \qquad
              \widehat{\Delta W} = \sum_i \tfrac{m_i}{p_i}\, Z_i^\top \hat X_i, \qquad p_i \propto |Z_i|\,|\hat X_i|

    with Z the 2 N rows of both digits. Half of them are computed on average, so two digits cost as much as one. See
    ``Leverage`` for how 1/p stays out of the integers. Both gradients are unbiased for the quantized forward pass.

    The steps are parameters that ``quantize_`` adds to the layers (``quantizers.output_input_step``): build the
    optimizer afterwards, and give them no weight decay. The first batch starts them and settles the block size; with
    several processes run one batch before wrapping the model, so that all start alike. While steps are learned, their
    gradient needs the layer's input in float, which is kept beside the 4-bit codes (two to a byte); without learned
    steps only codes and one mask are kept.

    Embeddings have no product and stay in float, as do softmax and normalisation.

    Args:
        hadamard: size of H's blocks, a power of two, smaller where it does not divide the features; 0 searches on the
            first batch; 1 leaves H out.
        learned_steps: whether the steps are learned; else every batch sets its own, by the formula they start from.
        sampling: whether the backward products sample rows; else they take all of both digits.
        keep: expected fraction of the digits' rows with sampling.
        attention: of attention, fused (``gradbits.nn.ScaledDotProductAttention``) or in products
            (``gradbits.nn.Matmul``): ``"float"`` or ``"int8_dynamic"``.
        keep_float: layers left in float.

    References:
        Xi et al., NeurIPS 2023, arXiv:2306.11987.

    >>> int4_transformer().grad_weight.gradient.grid.base
    14
    """
    check_choice(attention, "attention", ("float", "int8_dynamic"))
    check_instance(learned_steps, "learned_steps", bool)
    check_instance(sampling, "sampling", bool)
    steps: RangeRule = LearnedStep() if learned_steps else MeanStep()
    operand = Quantizer(
        grid=TwosComplement(bits=4),
        range=steps,
        estimator=LSQ() if learned_steps else STE(clip=True),
        rotation=None if hadamard == 1 else Hadamard(size=hadamard),
    )
    gradient = Quantizer(grid=BitSplit(bits=4), rounding="stochastic")
    rule = Leverage(keep=keep) if sampling else None
    return Recipe(
        name="int4_transformer",
        output=Output(input=operand, weight=operand),
        grad_input=GradInput(gradient=gradient, weight=operand, sampling=rule),
        grad_weight=GradWeight(gradient=gradient, input=operand, sampling=rule),
        share_gradient=True,
        keep_float=tuple(keep_float),
        matmul=int8_dynamic() if attention == "int8_dynamic" else False,
        attention=attention == "int8_dynamic",
    )
