"""Leverage-score sampling: rows of a product are drawn by their weight in it, and only those are computed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gradbits.core.checks import check_integer, check_number
from gradbits.core.noise import NoiseKey, uniform_noise
from gradbits.core.qtensor import QTensor
from gradbits.core.spec import Spec

RESOLUTION = 1 << 16  # the noise function gives 16 bits to an element
ROUNDS = 8  # of the search for the budget; each halves the gap in the logarithm


def row_norms(q: QTensor) -> torch.Tensor:
    """Return the norm of each row (entry along axis 0) of one digit, in float64.

    >>> q = QTensor(codes=torch.tensor([[3, 4], [0, 0]], dtype=torch.int8), scale=torch.tensor([[2.0]]), bits=4,
    ...             shape=torch.Size([2, 2]))
    >>> row_norms(q).tolist()
    [10.0, 0.0]
    """
    q = q.unpack()
    if q.zero_value() is not None or q.scale.numel() not in (1, q.codes.shape[0]):
        values = q.dequantize(torch.float32)
        return values.flatten(1).double().norm(dim=1)
    squares = q.codes.flatten(1).float().square_().sum(dim=1)
    return squares.double().sqrt() * q.scale.double().reshape(-1)


def water_fill(scores: torch.Tensor, budget: float) -> torch.Tensor:
    r"""Return the probabilities that minimise :math:`\sum c_i^2/p_i` under :math:`\sum p_i = n,\ p_i \le 1`.

    They are proportional to the scores, :math:`p_i = \min(1, \lambda c_i)`, with λ such that they sum to the budget;
    where fewer than n scores are positive, those rows have p = 1.

    Args:
        scores: ``c``, not negative.
        budget: ``n``, the expected number of rows.

    Returns:
        float64 probabilities; 0 for scores that are 0 or not finite.

    >>> water_fill(torch.tensor([8.0, 1.0, 1.0, 0.0]), 2.0).tolist()
    [1.0, 0.5, 0.5, 0.0]
    """
    c = torch.nan_to_num(scores.detach().double(), nan=0.0, posinf=0.0, neginf=0.0)
    if c.numel() == 0:
        return c
    c = c / c.max().clamp(min=torch.finfo(torch.float64).tiny)
    descending = c.sort(descending=True).values
    rest = descending.flip(0).cumsum(0).flip(0)  # of row m and all smaller ones
    rows = torch.arange(c.numel(), device=c.device, dtype=torch.float64)
    # with the m largest rows at p = 1 the others get (n - m) / rest each; right for the first m that leaves all below 1
    fits = (budget - rows) * descending <= rest
    full = fits.logical_not().cumprod(0).sum().clamp(max=c.numel() - 1)
    tail = rest.gather(0, full.view(1))
    factor = torch.where(tail > 0, (budget - full.double()) / tail, float("inf"))
    return torch.where(c > 0, c * factor, 0.0).clamp(0.0, 1.0)


def round_up(probabilities: torch.Tensor) -> torch.Tensor:
    """Return probabilities that 16 bits of noise realise exactly: multiples of 2^-16, none smaller than asked.

    >>> float(round_up(torch.tensor([0.3])) * 65536)
    19661.0
    """
    return torch.ceil(probabilities * RESOLUTION) / RESOLUTION


def grouped(probabilities: torch.Tensor, budget: float, smallest: int, per_octave: int) -> torch.Tensor:
    r"""Return probabilities of few different values, :math:`2^{-j/k}` down to :math:`2^{-J}`, that keep to the budget.

    Every probability is rounded up to the next of these values after all have been lowered by one common factor. With
    :math:`p_i = \lambda c_i e_i,\ 1 \le e_i < r = 2^{1/k}`, the second moment :math:`\sum c_i^2/p_i` exceeds the
    optimum for the same expected number of rows by a factor of at most :math:`(1+r)^2/(4r)` (Kantorovich's
    inequality): 1.125 for k = 1, 1.030 for k = 2, 1.008 for k = 4.

    Args:
        probabilities: from ``water_fill``.
        budget: what they sum to.
        smallest: ``J``; rows below it are drawn more often than they would need, which may exceed the budget.
        per_octave: ``k``, values per factor of two.

    Returns:
        Probabilities that 16 bits of noise realise exactly.

    >>> grouped(torch.tensor([1.0, 0.4, 0.1, 0.0], dtype=torch.float64), 1.5, 7, 1).tolist()
    [1.0, 0.25, 0.0625, 0.0]
    """

    def rounded(exponent: torch.Tensor) -> torch.Tensor:
        lowered = (probabilities * torch.exp2(exponent)).clamp(min=2.0**-smallest, max=1.0)
        steps = torch.ceil(torch.log2(lowered) * per_octave) / per_octave
        return torch.where(probabilities > 0, round_up(torch.exp2(steps)), 0.0)

    # lowered by a whole step the sum is within the budget; not lowered at all it is at or above it
    low, high = probabilities.new_full((), -1.0 / per_octave), probabilities.new_zeros(())
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        within = rounded(middle).sum() <= budget
        low, high = torch.where(within, middle, low), torch.where(within, high, middle)
    whole = rounded(torch.zeros_like(low))
    return torch.where(whole.sum() <= budget, whole, rounded(low))


def draw(probabilities: torch.Tensor, noise: NoiseKey | torch.Tensor) -> torch.Tensor:
    """Return which rows are kept, each by itself with its probability.

    Args:
        probabilities: multiples of 2^-16, so that a key's noise realises them exactly.
        noise: a noise key, or uniform numbers in (0, 1).

    >>> draw(torch.tensor([1.0, 0.0]), NoiseKey.of(0)).tolist()
    [True, False]
    """
    if isinstance(noise, NoiseKey):
        noise = uniform_noise(noise, probabilities.numel(), probabilities.device) + 0.5
    return noise < probabilities


@dataclass(frozen=True, kw_only=True)
class Leverage(Spec):
    r"""Leverage-score sampling (LSS): row i takes part with probability :math:`p_i` and then counts :math:`1/p_i`.

    The rows are those of the gradient's digits, Z; with two digits there are 2 N of them. Their scores are
    :math:`c_i = |Z_i|\,|\hat X_i|` in ``grad_weight`` = :math:`\sum_i \tfrac{m_i}{p_i} Z_i^\top \hat X_i` and
    :math:`c_i = |Z_i|` in ``grad_input``, the probabilities those of ``water_fill``. Unbiased, with

    .. math:: \mathrm{Var} = \sum_i \frac{1 - p_i}{p_i}\,|Z_i|^2\,|\hat X_i|^2

    How 1/p stays out of the integers: in ``grad_input`` the row is an axis of the result, so 1/p is a scale per row,
    for any p. ``grad_weight`` sums over the rows, where no scale may vary; there p takes few different values, and the
    rows of one value are an integer product of their own whose result counts 1/p. The products together have exactly
    the kept rows. At the same expected number of rows this raises the second moment :math:`\sum c_i^2/p_i` by at most
    a fraction ε, the variance by at most :math:`\epsilon(\mathrm{Var} + \sum c_i^2)`; ε is 3 % for two values per
    factor of two (see ``grouped``). Folding 1/p into codes instead would have to round or clip them.

    Args:
        keep: expected fraction of the digits' rows; one half makes two digits as much work as one.
        smallest: in ``grad_weight`` no probability is below 2^-smallest, which bounds the number of products.
        per_octave: values of p per factor of two in ``grad_weight``: more of them, less variance, smaller products.

    References:
        Xi et al., Training Transformers with 4-bit Integers, NeurIPS 2023, arXiv:2306.11987.
    """

    keep: float = 0.5
    smallest: int = 7
    per_octave: int = 2

    def __post_init__(self) -> None:
        check_number(self.keep, "Leverage.keep", 0.0, 1.0, open_low=True)
        check_integer(self.smallest, "Leverage.smallest", 0, int(math.log2(RESOLUTION)))
        check_integer(self.per_octave, "Leverage.per_octave", 1, 8)

    def scores(self, digits: tuple[QTensor, ...], other: QTensor | None) -> torch.Tensor:
        """Return the scores of all rows of all digits, highest digit first.

        Args:
            digits: of the gradient.
            other: the other operand where the product sums over the rows, else None.
        """
        norms = torch.stack([row_norms(q) for q in digits])
        if other is not None:
            norms = norms * torch.stack([row_norms(q) for q in other.digits()]).square().sum(0).sqrt()
        return norms.flatten()

    def probabilities(self, scores: torch.Tensor, few: bool) -> torch.Tensor:
        """Return the probabilities of rows with these scores; of few different values where ``few``."""
        budget = self.keep * scores.numel()
        p = water_fill(scores, budget)
        p = grouped(p, budget, self.smallest, self.per_octave) if few else round_up(p)
        return torch.where(torch.isfinite(scores), p, 1.0)  # a NaN must reach the result
