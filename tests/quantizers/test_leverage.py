"""Leverage-score sampling: probabilities, draws, variance."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradbits.core.errors import ArgumentError
from gradbits.core.noise import NoiseKey
from gradbits.quantizers.bit_split import BitSplit
from gradbits.quantizers.grids import Affine
from gradbits.quantizers.leverage import Leverage, draw, grouped, round_up, row_norms, water_fill
from gradbits.quantizers.quantizer import Quantizer
from gradbits.quantizers.ranges import MinMax


def scores(count: int, sigma: float, zeros: float, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    c = torch.exp(sigma * torch.randn(count, generator=g, dtype=torch.float64))
    return torch.where(torch.rand(count, generator=g) < zeros, torch.zeros_like(c), c)


def second_moment(c: torch.Tensor, p: torch.Tensor) -> float:
    return float(torch.where(p > 0, c.square() / p.clamp(min=1e-300), 0.0).sum())


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 200), st.floats(0, 5), st.floats(0, 1), st.integers(0, 1000))
def test_water_filling(count, sigma, zeros, seed):
    c = scores(count, sigma, zeros, seed)
    budget = count / 2
    p = water_fill(c, budget)
    assert bool(((p >= 0) & (p <= 1)).all())
    positive = int((c > 0).sum())
    assert float(p.sum()) == pytest.approx(min(budget, positive), rel=1e-9, abs=1e-9)
    if positive <= budget:
        assert torch.equal(p, (c > 0).double())
    order = c.argsort()
    assert bool((p[order].diff() >= -1e-12).all())
    below = (p < 1) & (c > 0)
    if int(below.sum()) > 1:  # proportional to the scores
        ratio = p[below] / c[below]
        assert float(ratio.max() / ratio.min()) == pytest.approx(1.0, rel=1e-9)


def test_water_filling_is_optimal():
    """No move of probability from one row to another lowers the second moment."""
    c = scores(30, 1.5, 0.0, 3)
    p = water_fill(c, 15.0)
    best = second_moment(c, p)
    g = torch.Generator().manual_seed(0)
    for _ in range(300):
        i, j = torch.randint(0, 30, (2,), generator=g).tolist()
        q = p.clone()
        shift = min(0.05, float(q[i]) * 0.9, 1 - float(q[j]))
        q[i] -= shift
        q[j] += shift
        assert second_moment(c, q) >= best - 1e-9 * best


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 300), st.floats(0, 3), st.sampled_from([1, 2, 4]), st.integers(0, 1000))
def test_few_values(count, sigma, per_octave, seed):
    c = scores(count, sigma, 0.1, seed)
    budget = count / 2
    p = water_fill(c, budget)
    q = grouped(p, budget, 16, per_octave)
    assert float(q.sum()) <= budget * (1 + 1e-3) + 1e-9
    assert bool(((q > 0) == (p > 0)).all())
    assert bool((q * 65536 == torch.round(q * 65536)).all())
    legal = round_up(torch.exp2(-torch.arange(16 * per_octave + 1, dtype=torch.float64) / per_octave))
    assert bool(torch.isin(q[q > 0], legal).all())
    # Kantorovich: at the rows that it spends, the second moment is near the best one
    r = 2 ** (1 / per_octave)
    best = second_moment(c, water_fill(c, float(q.sum())))
    assert second_moment(c, q) <= (1 + r) ** 2 / (4 * r) * best * (1 + 1e-3)


def test_smallest_probability_bounds_the_number_of_products():
    c = scores(5000, 4.0, 0.0, 1)
    q = grouped(water_fill(c, 2500.0), 2500.0, 7, 2)
    assert float(q.min()) >= 2.0**-7
    assert q.unique().numel() <= 15


def test_draws_have_exactly_their_probability():
    """Every one of the 65,536 noise values counts once: the frequency over all of them is p itself."""
    p = round_up(torch.tensor([0.3, 1e-5, 1.0, 0.0, 0.99999], dtype=torch.float64))
    uniform = (torch.arange(65_536, dtype=torch.float64) + 0.5) / 65_536
    for chance in p:
        assert float(draw(chance.expand(65_536), uniform).double().mean()) == float(chance)


def test_draws_are_independent_of_one_another_and_of_other_streams():
    """Counts over 4,000 draws: binomial bounds, false alarm 1e-6."""
    p = torch.full((64,), 0.25, dtype=torch.float64)
    drawn = torch.stack([draw(p, NoiseKey.of(seed, 6)) for seed in range(4000)]).double()
    limit = math.sqrt(0.25 * 0.75 / 4000 * 2 * math.log(2 * 64 / 1e-6))
    assert float((drawn.mean(0) - 0.25).abs().max()) < limit
    assert float(drawn.sum(1).var()) == pytest.approx(64 * 0.25 * 0.75, rel=0.15)
    other = torch.stack([draw(p, NoiseKey.of(seed, 7)) for seed in range(4000)]).double()
    correlation = ((drawn - 0.25) * (other - 0.25)).mean() / (0.25 * 0.75)
    assert abs(float(correlation)) < 5 / math.sqrt(4000 * 64)


def test_row_norms():
    x = torch.randn(6, 5, 2)
    for quantizer in (
        Quantizer(),
        Quantizer(grain="row"),
        Quantizer(grid=Affine(), range=MinMax()),
        Quantizer(grain="channel"),
    ):
        q = quantizer.quantize(x)
        for value in (q, q.pack()):
            torch.testing.assert_close(
                row_norms(value), q.dequantize().flatten(1).double().norm(dim=1), rtol=1e-5, atol=1e-7
            )


def test_variance_formula():
    """Var = sum (1-p)/p |Z|²|X|², and far below uniform sampling where a few rows matter."""
    torch.manual_seed(0)
    n = 64
    z = torch.randn(2 * n, 6, dtype=torch.float64) * torch.exp(1.5 * torch.randn(2 * n, 1))
    x = torch.randn(2 * n, 5, dtype=torch.float64)
    c = z.norm(dim=1) * x.norm(dim=1)
    p = round_up(water_fill(c, n))
    uniform = torch.full_like(p, 0.5)
    formula = {}
    for name, chance in (("leverage", p), ("uniform", uniform)):
        formula[name] = float(((1 - chance) / chance * c.square()).sum())
    draws = torch.stack(
        [(z * (draw(p, NoiseKey.of(seed, 7)) / p).unsqueeze(1)).t() @ x for seed in range(1000)]
    )
    assert float(draws.var(0).sum()) == pytest.approx(formula["leverage"], rel=0.15)
    exact = z.t() @ x
    spread = draws.var(0).div(1000).sqrt()
    assert float(((draws.mean(0) - exact).abs() / spread).max()) < 5.5
    assert formula["uniform"] > 5 * formula["leverage"]


def test_scores_of_both_products():
    g, x = torch.randn(8, 4), torch.randn(8, 3)
    q = Quantizer(grid=BitSplit(), rounding="stochastic").quantize(g)
    qx = Quantizer().quantize(x)
    rule = Leverage()
    norms = torch.cat([d.dequantize().double().norm(dim=1) for d in q.digits()])
    torch.testing.assert_close(rule.scores(q.digits(), None), norms, rtol=1e-5, atol=1e-7)
    expected = norms * qx.dequantize().double().norm(dim=1).repeat(2)
    torch.testing.assert_close(rule.scores(q.digits(), qx), expected, rtol=1e-5, atol=1e-7)
    p = rule.probabilities(expected, few=True)
    assert float(p.sum()) <= 8.01


def test_nan_scores_are_kept():
    c = torch.tensor([1.0, math.nan, 2.0, math.inf])
    p = Leverage().probabilities(c, few=True)
    assert float(p[1]) == float(p[3]) == 1.0
    assert water_fill(torch.empty(0), 0.0).numel() == 0
    assert torch.equal(water_fill(torch.zeros(3), 1.5), torch.zeros(3, dtype=torch.float64))


def test_illegal_arguments():
    for options in ({"keep": 0.0}, {"keep": 1.5}, {"smallest": 17}, {"smallest": -1}, {"per_octave": 0}):
        with pytest.raises(ArgumentError, match="Leverage"):
            Leverage(**options)
