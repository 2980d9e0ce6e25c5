"""LSQ: weights and activations whose step sizes are learned."""

from __future__ import annotations

from gradbits.core.checks import check_bits, check_instance
from gradbits.core.grain import PerChannel, PerTensor
from gradbits.quantizers.grids import Grid, TwosComplement, Unsigned
from gradbits.quantizers.lsq import LSQ, LearnedStep
from gradbits.quantizers.quantizer import Quantizer
from gradbits.recipes.learning import QuantizerLearning
from gradbits.recipes.recipe import Output, Recipe
from gradbits.recipes.registry import published


@published(
    title="Learned Step Size Quantization",
    paper="arXiv:1902.08153 (ICLR 2020)",
    survey="LSQ",
    unbiased=True,
)
def lsq(
    *,
    weight_bits: int = 4,
    activation_bits: int = 4,
    signed_activations: bool = False,
    per_channel: bool = False,
    quantizer_rate: float = 1.0,
    keep_float: tuple[str, ...] = ("first_conv", "last_linear"),
) -> Recipe:
    r"""Train weights and activations of few bits with learned step sizes (LSQ).

    .. math:: \hat x = s\,\mathrm{clamp}(\mathrm{round}(x/s), Q_n, Q_p), \qquad
              \frac{\partial \hat x}{\partial s} = \begin{cases} Q_n & x/s < Q_n \\ Q_p & x/s > Q_p \\
              \mathrm{round}(x/s) - x/s & \text{otherwise} \end{cases}

    with the gradient of s divided by :math:`\sqrt{N Q_p}`; Q_n, Q_p are -2^{b-1}, 2^{b-1}-1 for weights and
    0, 2^b-1 for activations. The first batch starts s at :math:`2\,\overline{|x|}/\sqrt{Q_p}`. Gradients are computed
    in float.

    Args:
        weight_bits, activation_bits: 2 to 8.
        signed_activations: whether activations take negative codes as well, as inputs need that do not follow a ReLU.
        per_channel: whether each output channel's weights have a step of their own; the paper has one per layer.
        quantizer_rate: learning rate of the steps relative to that of the weights; they get no weight decay.
        keep_float: layers left in float: by default the first convolution and the classifier. The paper takes 8 bits
            there: ``{"conv1": gb.recipe("lsq", weight_bits=8, ...), "*": ...}`` does so.

    References:
        Esser et al., ICLR 2020, arXiv:1902.08153.

    >>> lsq(activation_bits=2).output.input.grid.levels, lsq().output.weight.grid.levels
    ((0, 3), (-8, 7))
    """
    check_bits(weight_bits, "weight_bits")
    check_bits(activation_bits, "activation_bits")
    check_instance(signed_activations, "signed_activations", bool)
    check_instance(per_channel, "per_channel", bool)
    grid: Grid = TwosComplement(bits=activation_bits) if signed_activations else Unsigned(bits=activation_bits)
    activation = Quantizer(grid=grid, range=LearnedStep(), estimator=LSQ())
    weight = Quantizer(
        grid=TwosComplement(bits=weight_bits),
        grain=PerChannel(axis=0) if per_channel else PerTensor(),
        range=LearnedStep(),
        estimator=LSQ(),
    )
    return Recipe(
        name="lsq",
        output=Output(input=activation, weight=weight),
        keep_float=tuple(keep_float),
        matmul=False,
        quantizer_learning=QuantizerLearning(rate=quantizer_rate),
    )
