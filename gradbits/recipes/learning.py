"""What a recipe asks of the training loop for what its quantizers learn or measure."""

from __future__ import annotations

from dataclasses import dataclass

from gradbits.core.checks import check_instance, check_integer, check_number
from gradbits.core.spec import Spec


@dataclass(frozen=True, kw_only=True)
class QuantizerLearning(Spec):
    """How the optimizer moves what quantizers learn: a group of their own, without weight decay.

    Args:
        rate: learning rate relative to that of the weights.
    """

    rate: float = 1.0

    def __post_init__(self) -> None:
        check_number(self.rate, "QuantizerLearning.rate", 0.0)


@dataclass(frozen=True, kw_only=True)
class HessianScaling(Spec):
    r"""When and how the factor delta of ``EWGS`` is measured, per layer and operand.

    .. math:: \delta = \max\Big(0,\ \frac{1}{B} \sum \frac{\mathrm{Tr}(H)/N}{3\,\mathrm{std}(g_{x_q})}\Big)

    over B batches, with H the Hessian of the loss by the N discretized values, its trace by Hutchinson's estimator.

    Args:
        period: epochs between two measurements; none before the first epoch.
        batches: B; each as large as ``samples``.
        samples: of a batch, the first so many; 0 takes all of a training batch.
        probes: random vectors at most.
        tolerance: relative change of the mean over the probes below which no more are drawn.
        official_behaviour: reproduce two defects of the official code: a negative running trace ends the probes at
            once, and where a loader gives no more than B batches the sum is divided by one less than their number.

    References:
        Lee, Kim, Ham, CVPR 2021, arXiv:2104.00903: 10 epochs and 3 batches of 256 for CIFAR-10, 1 epoch and 10
        batches of 16 for ImageNet, 50 probes, tolerance 1e-3.
    """

    period: int = 1
    batches: int = 3
    samples: int = 32
    probes: int = 50
    tolerance: float = 1e-3
    official_behaviour: bool = False

    def __post_init__(self) -> None:
        for name, low in (("period", 1), ("batches", 1), ("samples", 0), ("probes", 1)):
            check_integer(getattr(self, name), f"HessianScaling.{name}", low)
        check_number(self.tolerance, "HessianScaling.tolerance", 0.0)
        check_instance(self.official_behaviour, "HessianScaling.official_behaviour", bool)
