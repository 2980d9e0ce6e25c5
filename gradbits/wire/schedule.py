"""When levels are adapted."""

from __future__ import annotations

from dataclasses import dataclass

from gradbits.core.checks import check_instance, check_integer
from gradbits.core.spec import Spec


@dataclass(frozen=True, kw_only=True)
class LevelSchedule(Spec):
    """Steps before which the levels are adapted: some early ones, then every so many.

    Args:
        at: early steps, counted from 0.
        every: period of the later ones; 10,000 for CIFAR and 50,000 for ImageNet in the authors' experiments.

    Raises:
        ArgumentError: a step below 0 or a period below 1.

    References:
        Faghri et al., Adaptive Gradient Quantization for Data-Parallel SGD, NeurIPS 2020, arXiv:2010.12460.

    >>> [step for step in range(25_000) if LevelSchedule().is_due(step)]
    [0, 100, 2000, 10000, 20000]
    """

    at: tuple[int, ...] = (0, 100, 2000)
    every: int = 10_000

    def __post_init__(self) -> None:
        check_instance(self.at, "at", tuple, list)
        object.__setattr__(self, "at", tuple(check_integer(step, "at", 0) for step in self.at))
        check_integer(self.every, "every", 1)

    def is_due(self, step: int) -> bool:
        """Return whether the levels are to be adapted before step ``step``."""
        check_integer(step, "step", 0)
        return step in self.at or (step > 0 and step % self.every == 0)
