"""EWGS: weights and activations from 1 bit, with gradients scaled by the error of the rounding."""

from __future__ import annotations

from gradbits.core.checks import check_bits, check_instance, check_number
from gradbits.quantizers.ewgs import EWGS
from gradbits.quantizers.interval import ActivationInterval, UnitInterval, WeightInterval
from gradbits.quantizers.quantizer import Quantizer
from gradbits.recipes.learning import HessianScaling, QuantizerLearning
from gradbits.recipes.recipe import Output, Recipe
from gradbits.recipes.registry import published


@published(
    title="Network Quantization with Element-wise Gradient Scaling",
    paper="arXiv:2104.00903 (CVPR 2021)",
    survey="EWGS",
    unbiased=False,
)
def ewgs(
    *,
    weight_bits: int = 2,
    activation_bits: int = 2,
    delta: float | None = None,
    period: int = 1,
    batches: int = 3,
    samples: int = 32,
    probes: int = 50,
    official_behaviour: bool = False,
    normalise: bool = True,
    bias_inside: bool = False,
    quantizer_rate: float = 0.1,
    keep_float: tuple[str, ...] = ("first_conv", "last_linear"),
) -> Recipe:
    r"""Train weights and activations of few bits with element-wise gradient scaling (EWGS).

    Both operands are clipped to learned intervals and rounded to n = 2^b levels; the product of the integers is scaled
    by a learned factor:

    .. math:: x_n = \mathrm{clip}\Big(\frac{x-l}{u-l}, 0, 1\Big), \quad
              x_q = \frac{\mathrm{round}((n-1)x_n)}{n-1}, \quad y = |\alpha|\,(a_q * (2 w_q - 1)) + b

    .. math:: g_{x_n} = g_{x_q}\,(1 + \delta\,\mathrm{sign}(g_{x_q})\,(x_n - x_q))

    With 1 bit, weights are -1 and 1, activations 0 and 1. Gradients are computed in float. δ = 0 is the
    straight-through estimator; otherwise δ is measured from the Hessian, for each layer's weights and activations on
    their own: ``gradbits train`` does it after every period, a loop of your own with ``gradbits.optim.DeltaSchedule``.

    The paper starts from a trained float network: load its weights before training (``gradbits train --init``). The
    first batch starts intervals and factors; with several processes it does so on all of them alike.

    Args:
        weight_bits, activation_bits: 1 to 8.
        delta: a fixed δ for both operands (the paper's code suggests 1e-3); None measures it, 0 is the plain
            straight-through estimator.
        period: epochs between two measurements. The paper takes 10 for CIFAR-10 (of 400 epochs) and 1 for ImageNet (of
            100); 1 is our default, for short training.
        batches, samples, probes, official_behaviour: see ``HessianScaling``.
        normalise: see ``EWGS``; the paper has no such thing and uses Adam.
        bias_inside: whether α applies to a layer's bias too, as in the official code; see ``WeightInterval``.
        quantizer_rate: learning rate of intervals and factors relative to that of the weights; they get no weight
            decay. The paper takes 1e-5 against 1e-3 (Adam) or 1e-2 (SGD).
        keep_float: layers left in float: by default the first convolution and the classifier, as in the paper.

    References:
        Lee, Kim, Ham, CVPR 2021, arXiv:2104.00903.

    >>> recipe = ewgs(weight_bits=1, activation_bits=4)
    >>> recipe.output.weight.grid, recipe.output.input.bits, recipe.hessian.batches
    (UnitInterval(bits=1, signed=True), 4, 3)
    """
    check_bits(weight_bits, "weight_bits", 1)
    check_bits(activation_bits, "activation_bits", 1)
    check_instance(delta, "delta", float, int, None)
    start = 0.0 if delta is None else check_number(delta, "delta", 0.0)
    estimator = EWGS(normalise=normalise)
    activation = Quantizer(
        grid=UnitInterval(bits=activation_bits), range=ActivationInterval(delta=start), estimator=estimator
    )
    weight = Quantizer(
        grid=UnitInterval(bits=weight_bits, signed=True),
        range=WeightInterval(delta=start, bias_inside=bias_inside),
        estimator=estimator,
    )
    hessian = HessianScaling(
        period=period, batches=batches, samples=samples, probes=probes, official_behaviour=official_behaviour
    )
    return Recipe(
        name="ewgs",
        output=Output(input=activation, weight=weight),
        keep_float=tuple(keep_float),
        matmul=False,
        quantizer_learning=QuantizerLearning(rate=quantizer_rate),
        hessian=hessian if delta is None else None,
    )
