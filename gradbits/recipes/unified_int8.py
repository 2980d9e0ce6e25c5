"""Unified INT8: clip gradients where they keep their direction best, and slow down the layers that still deviate."""

from __future__ import annotations

from gradbits.core.checks import check_choice
from gradbits.quantizers.direction_clip import DirectionClip
from gradbits.quantizers.grids import Symmetric
from gradbits.quantizers.quantizer import Quantizer
from gradbits.quantizers.ranges import EMA, AbsMax, RangeRule
from gradbits.recipes.recipe import GradInput, GradWeight, LayerLearningRate, Output, Recipe
from gradbits.recipes.registry import published


@published(
    title="Towards Unified INT8 Training for Convolutional Neural Network",
    paper="arXiv:1912.12607 (CVPR 2020)",
    survey="Unified INT8, UI8",
    unbiased=False,
)
def unified_int8(
    *,
    bits: int = 8,
    refresh: int = 100,
    search: str = "grid",
    alpha: float = 20.0,
    beta: float = 0.1,
    activation_range: str = "batch",
    rounding: str = "stochastic",
    keep_float: tuple[str, ...] = ("first_conv", "last_linear"),
    attention: bool = True,
) -> Recipe:
    r"""Train in 8 bits with direction-sensitive clipping and deviation-counteractive learning rates.

    Every operand has one scale per tensor, s = c/127 and q = round(clip(x, c)/s). Weights and activations take
    c = max|x|. The gradient's c is searched for every T steps (direction-sensitive gradient clipping, DSGC):

    .. math:: c = \arg\min_c d_c, \qquad d_c = 1 - \frac{\langle g, \hat g\rangle}{|g|\,|\hat g|}

    and a layer whose gradient still deviates learns more slowly (deviation-counteractive learning rate scaling,
    DCLRS): η ← η · φ(d_c), φ(d) = max(exp(-α d), β).

    Clipping makes the gradients biased by design.

    Args:
        bits: bits of all codes.
        refresh: T, steps between two searches (our default; unconfirmed).
        search: ``"grid"`` or ``"descent"``, see ``DirectionClip``.
        alpha, beta: α and β of φ.
        activation_range: ``"batch"`` takes each batch's max|x|, ``"ema"`` a running one (unconfirmed which).
        rounding: of the gradient; the paper's is unconfirmed, stochastic is our default.
        keep_float: layers left in float: by default the first convolution and the classifier, as in the paper.
        attention: whether fused attention multiplies 8-bit codes; the paper's networks have none.

    References:
        Zhu et al., CVPR 2020, arXiv:1912.12607.

    >>> unified_int8().grad_input.gradient.range
    DirectionClip(refresh=100, search='grid', guard=2.0)
    """
    check_choice(activation_range, "activation_range", ("batch", "ema"))
    grid = Symmetric(bits=bits)
    running: RangeRule = EMA(of=AbsMax()) if activation_range == "ema" else AbsMax()
    weight = Quantizer(grid=grid)
    activation = Quantizer(grid=grid, range=running)
    gradient = Quantizer(grid=grid, range=DirectionClip(refresh=refresh, search=search), rounding=rounding)
    return Recipe(
        name="unified_int8",
        output=Output(input=activation, weight=weight),
        grad_input=GradInput(gradient=gradient, weight=weight),
        grad_weight=GradWeight(gradient=gradient, input=activation),
        share_gradient=True,
        keep_float=tuple(keep_float),
        matmul=False,
        attention=attention,
        learning_rate=LayerLearningRate(alpha=alpha, beta=beta),
    )
