"""Distribution-Adaptive INT8: gradients per channel for the weights, clipped by the shape of each channel."""

from __future__ import annotations

from gradbits.core.checks import check_choice, check_instance
from gradbits.core.grain import PerChannel, PerTensor
from gradbits.quantizers.grids import Symmetric
from gradbits.quantizers.magnitude_clip import MagnitudeClip
from gradbits.quantizers.quantizer import Quantizer
from gradbits.quantizers.ranges import AbsMax, RangeRule
from gradbits.recipes.recipe import GradInput, GradWeight, Output, Recipe
from gradbits.recipes.registry import published


@published(
    title="Distribution Adaptive INT8 Quantization for Training CNNs",
    paper="arXiv:2102.04782 (AAAI 2021)",
    survey="Distribution-Adaptive INT8, DAI8",
    unbiased=False,
)
def adaptive_int8(
    *,
    bits: int = 8,
    vectorized: bool = True,
    threshold: float = 0.3,
    k: float = 1.0,
    a: float = 0.8,
    rule: str = "ema",
    alpha: float = 1.0,
    update_interval: int = 1,
    grad_input_range: str = "max",
    rounding: str = "stochastic",
    keep_float: tuple[str, ...] = ("first_conv", "last_linear"),
) -> Recipe:
    r"""Train in 8 bits with gradient vectorized quantization (GVQ) and magnitude-aware clipping (MCS).

    Gradients of different output channels differ widely in size. ``grad_weight`` = Gᵀ X sums over samples and
    positions, so the scale of G may follow its output channels c and leaves the product along its rows:

    .. math:: \hat g_c = \tfrac{s_c}{127}\,\mathrm{round}\big(127\,\mathrm{clamp}(g_c, s_c)/s_c\big), \qquad
              \Delta W_c = \tfrac{s_c}{127}\tfrac{s_x}{127}\,(q_g^\top q_x)_c

    with s_c by the channel's distribution, see ``MagnitudeClip``. ``grad_input`` sums over the channels and keeps one
    scale per tensor, as do weights and activations (s = max|x|).

    Where an inverted-T channel's s lags behind a growing max|g|, values clip and the weight gradient is biased.

    Convolutions with groups: ``grad_weight`` works within each group, and every output channel belongs to one, so the
    scales s_c stay legal, for depthwise convolutions too; the scales of input and weight are per tensor and run across
    the groups unchanged. Depthwise convolutions could carry s_c in ``grad_input`` as well, because each channel is then
    its own sum; this recipe keeps the one scale per tensor there. Transposed convolutions with groups have one scale
    group for several channels of the weight's first axis and stay in float, which ``report`` shows.

    Args:
        bits: of all codes.
        vectorized: whether ``grad_weight`` takes one scale per output channel (GVQ) or one per tensor.
        threshold: λ of the classifier.
        k, a: of the average for inverted-T channels; paper: 1 and 0.8.
        rule, alpha, update_interval: see ``MagnitudeClip``; α and the interval are unconfirmed.
        grad_input_range: ``"max"``, or ``"clip"`` for the same clipping on the whole tensor (unconfirmed which).
        rounding: of gradients; the paper shows plain rounding and does not settle it: stochastic is our default.
        keep_float: layers left in float (unconfirmed): by default the first convolution and the classifier.

    References:
        Zhao et al., AAAI 2021, arXiv:2102.04782.

    >>> adaptive_int8().grad_weight.gradient.grain, adaptive_int8().grad_input.gradient.grain
    (PerChannel(axis=1), PerTensor())
    """
    check_choice(grad_input_range, "grad_input_range", ("max", "clip"))
    check_instance(vectorized, "vectorized", bool)
    grid = Symmetric(bits=bits)
    plain = Quantizer(grid=grid)
    clip: RangeRule = MagnitudeClip(
        threshold=threshold, k=k, a=a, rule=rule, alpha=alpha, update_interval=update_interval
    )
    by_channel = Quantizer(
        grid=grid, range=clip, grain=PerChannel(axis=1) if vectorized else PerTensor(), rounding=rounding
    )
    whole = Quantizer(grid=grid, range=clip if grad_input_range == "clip" else AbsMax(), rounding=rounding)
    return Recipe(
        name="adaptive_int8",
        output=Output(input=plain, weight=plain),
        grad_input=GradInput(gradient=whole, weight=plain),
        grad_weight=GradWeight(gradient=by_channel, input=plain),
        keep_float=tuple(keep_float),
        matmul=False,
    )
