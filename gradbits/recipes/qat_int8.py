"""Quantization-aware training for integer-only inference: affine activations, folded batch norms, zero exact."""

from __future__ import annotations

from gradbits.core.checks import check_choice
from gradbits.core.grain import Grain, PerChannel, PerTensor
from gradbits.quantizers.estimators import STE
from gradbits.quantizers.grids import Affine, Symmetric
from gradbits.quantizers.quantizer import Quantizer
from gradbits.quantizers.ranges import EMA, MinMax
from gradbits.recipes.recipe import QAT, Output, Recipe
from gradbits.recipes.registry import published

GRAINS: dict[str, Grain] = {"tensor": PerTensor(), "channel": PerChannel(axis=0)}


@published(
    title="Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
    paper="arXiv:1712.05877 (CVPR 2018)",
    survey="QAT, quantization-aware training",
    unbiased=True,
)
def qat_int8(
    *,
    weight_bits: int = 8,
    activation_bits: int = 8,
    weights: str = "channel",
    decay: float = 0.99,
    delay: int = 0,
    freeze: int | None = None,
    rounding: str = "single",
) -> Recipe:
    r"""Train through the rounding of integer-only inference, then ``convert_`` to integers without any further loss.

    Real numbers are r = S(q - Z) with an integer Z, so zero is a code exactly. Activations take the range [a, b] of an
    exponential moving average of each batch's minimum and maximum, nudged until Z is an integer:

    .. math:: S = \frac{b-a}{2^n-1}, \qquad Z = \mathrm{round}\!\left(q_{\min} - \frac{a}{S}\right)

    Weights take the symmetric codes -127 .. 127 over their own range. Batch norms are folded into the weights before
    these are quantized, with the running statistics that inference will use,

    .. math:: w_\mathrm{fold} = \frac{\gamma w}{\sqrt{\mathrm{EMA}(\sigma_B^2)+\varepsilon}}, \qquad
              b_\mathrm{fold} = \beta - \frac{\gamma\,\mathrm{EMA}(\mu_B)}{\sqrt{\mathrm{EMA}(\sigma_B^2)+\varepsilon}}

    and training rescales each channel to the batch's statistics until step ``freeze``. Biases stay in float while
    training and are int32 with scale S1·S2 in inference. Activations are quantized after a fused ReLU or ReLU6, at
    the input, at additions, concatenations and averages. Gradients stay in float and pass straight through, clipped to
    the range of activations.

    Args:
        weight_bits, activation_bits: 2 to 8.
        weights: ``"channel"`` for a scale per output channel, ``"tensor"`` for one per layer, as in the paper.
        decay: of the moving averages. The paper asks for one close to 1; 0.99 suits some thousand steps.
        delay: steps before activations are quantized, while their ranges are followed; the paper delays long trainings
            by 50,000 steps and more.
        freeze: step from which batch norms use their running statistics; None: never.
        rounding: of sums in inference: ``"single"``, or ``"double"`` as in gemmlowp and the paper.

    References:
        Jacob et al., CVPR 2018, arXiv:1712.05877; the rescaling to batch statistics and their freezing are described in
        Krishnamoorthi, Quantizing Deep Convolutional Networks for Efficient Inference, 2018, arXiv:1806.08342.

    >>> recipe = qat_int8(weight_bits=4)
    >>> recipe.output.weight.grid, recipe.output.input.grid.zero
    (Symmetric(bits=4), 'nudge')
    """
    check_choice(weights, "weights", GRAINS)
    activation = Quantizer(
        grid=Affine(bits=activation_bits, zero="nudge"),
        range=EMA(decay=decay, of=MinMax()),
        estimator=STE(clip=True),
    )
    weight = Quantizer(grid=Symmetric(bits=weight_bits), grain=GRAINS[weights])
    return Recipe(
        name="qat_int8",
        output=Output(input=activation, weight=weight),
        matmul=False,
        qat=QAT(delay=delay, freeze=freeze, rounding=rounding),
    )
