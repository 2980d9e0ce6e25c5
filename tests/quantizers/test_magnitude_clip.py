"""Magnitude-aware clipping: the classifier, the average, the exact stationary point."""

from __future__ import annotations

import math

import pytest
import torch

from gradbits.core.errors import ArgumentError
from gradbits.core.grain import PerChannel, PerTensor
from gradbits.quantizers.grids import Symmetric
from gradbits.quantizers.magnitude_clip import MagnitudeClip, channel_statistics, exact_clip
from gradbits.quantizers.quantizer import Quantizer


def samples(kind: str, count: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    u = torch.rand(count, generator=g, dtype=torch.float64)
    normal = torch.randn(count, generator=g, dtype=torch.float64)
    if kind == "gaussian":
        return normal.float()
    if kind == "uniform":
        return (2 * u - 1).float()
    if kind == "laplace":
        return (torch.sign(u - 0.5) * -torch.log1p(-2 * (u - 0.5).abs())).float()
    if kind == "student3":
        chi = torch.randn(3, count, generator=g, dtype=torch.float64).square().sum(0)
        return (normal / (chi / 3).sqrt()).float()
    assert kind == "inverted_t"
    return torch.where(u < 0.98, torch.zeros_like(u), normal).float()


@pytest.mark.parametrize(
    ("kind", "gaussian", "outside"),
    [
        ("gaussian", True, 0.3173),
        ("uniform", True, 0.4226),
        ("laplace", False, 0.2431),
        ("student3", False, 0.18),
        ("inverted_t", False, 0.02),
    ],
)
def test_classifier(kind, gaussian, outside):
    x = samples(kind, 65_536)
    statistics = channel_statistics(x, PerTensor())
    assert float(statistics.outside) == pytest.approx(outside, abs=0.02)
    rule = MagnitudeClip()
    assert bool(rule.is_gaussian(statistics)) is gaussian
    for scale in (2.0**-90, 2.0**90):  # whatever the gradient's size, even where its square leaves float32
        assert torch.equal(channel_statistics(x * scale, PerTensor()).outside, statistics.outside)


def test_threshold_moves_the_border():
    statistics = channel_statistics(samples("laplace", 65_536), PerTensor())
    assert not bool(MagnitudeClip(threshold=0.3).is_gaussian(statistics))
    assert bool(MagnitudeClip(threshold=0.2).is_gaussian(statistics))


def test_small_channels_misfire_as_often_as_known():
    """A true Gaussian of 256 values is called inverted-T with probability 0.16: binomial test, false alarm 1e-6."""
    x = samples("gaussian", 256 * 2000).view(2000, 256)
    statistics = channel_statistics(x, PerChannel(axis=0))
    rate = float((~MagnitudeClip().is_gaussian(statistics)).double().mean())
    assert abs(rate - 0.16) < 5 * math.sqrt(0.16 * 0.84 / 2000) + 0.01


def test_gaussian_channels_are_never_clipped():
    rule = MagnitudeClip()
    state = rule.init_state(1)
    for seed in range(4):
        x = samples("gaussian", 8192, seed) * 3.0**seed
        _, high = rule.limits(x, PerTensor(), state, True)
        assert float(high) == float(x.abs().max())


@pytest.mark.parametrize(("k", "a"), [(1.0, 0.8), (1.0, 0.5), (2.0, 0.4), (1.5, 1.0)])
def test_average_of_a_constant_maximum(k, a):
    """|s_t - m/k| shrinks by |1 - kA| at every step; for the paper's constants by 0.2."""
    rule = MagnitudeClip(k=k, a=a)
    x = samples("inverted_t", 4096)
    first, maximum = 5.0, float(x.abs().max())
    state = rule.init_state(1)
    state["clip"].fill_(first)
    for step in range(1, 8):
        _, high = rule.limits(x, PerTensor(), state, True)
        expected = maximum / k + (1 - k * a) ** step * (first - maximum / k)
        assert float(high) == pytest.approx(expected, rel=1e-5)


def test_first_batch_starts_the_average():
    rule = MagnitudeClip()
    state = rule.init_state(1)
    x = samples("inverted_t", 4096)
    assert float(rule.limits(x, PerTensor(), state, True)[1]) == float(x.abs().max())
    _, high = rule.limits(3 * x, PerTensor(), state, True)
    assert float(high) == pytest.approx(float(x.abs().max()) * (0.2 + 0.8 * 3), rel=1e-6)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0, 20.0])
def test_exact_clip_is_the_least_error(alpha):
    """Bisection against a brute-force grid on the error itself."""
    core, mass = 0.02, 0.98
    a, b = mass / (2 * core), (1 - mass) / (2 * (1 - core))
    s = torch.linspace(core, 1.0, 4001, dtype=torch.float64)

    def weight(low: torch.Tensor, high: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:  # ∫ (g - shift) e^{αg} dg
        def primitive(g: torch.Tensor) -> torch.Tensor:
            return torch.exp(alpha * g) * ((g - shift) / alpha - 1 / alpha**2)

        return primitive(high) - primitive(low)

    one = torch.ones_like(s)
    inside = (a * (math.exp(alpha * core) - 1) + b * (torch.exp(alpha * s) - math.exp(alpha * core))) / alpha
    error = s / 127 * inside + 2 * b * weight(s, one, s)
    best = float(s[error.argmin()])
    found = float(exact_clip(torch.tensor([core]), torch.tensor([mass]), alpha))
    assert found == pytest.approx(best, abs=1e-3)
    assert found == pytest.approx({0.5: 0.8751, 1.0: 0.9212, 4.0: 0.9915, 20.0: 0.9960}[alpha], abs=1e-3)


def test_exact_clip_says_where_it_does_not_hold():
    nan = exact_clip(torch.tensor([0.5, 0.0, 1.0, 0.3]), torch.tensor([0.9999999, 0.5, 1.0, 1.0]), 1.0)
    assert bool(torch.isnan(nan).all())
    rule = MagnitudeClip(rule="exact")
    x = torch.zeros(64)
    x[0] = 1.0
    _, high = rule.limits(x, PerTensor(), rule.init_state(1), True)
    assert 0 < float(high) <= 1.0
    assert bool(torch.isfinite(exact_clip(torch.tensor([0.02]), torch.tensor([0.98]), 500.0)).all())  # e^500 overflows


def test_exact_rule_clips_inverted_t_channels():
    rule = MagnitudeClip(rule="exact", alpha=1.0)
    x = torch.cat([samples("inverted_t", 8192), torch.tensor([30.0])])
    _, high = rule.limits(x, PerTensor(), rule.init_state(1), True)
    assert 0.5 * 30 < float(high) < 30.0
    gaussian = samples("gaussian", 8192)
    assert float(rule.limits(gaussian, PerTensor(), rule.init_state(1), True)[1]) == float(gaussian.abs().max())


def test_update_interval_holds_the_clip():
    rule = MagnitudeClip(update_interval=3)
    state = rule.init_state(2)
    x = torch.stack([samples("gaussian", 4096), samples("inverted_t", 4096)])
    first = rule.limits(x, PerChannel(axis=0), state, True)[1].clone()
    for factor in (2.0, 5.0):
        assert torch.equal(rule.limits(factor * x, PerChannel(axis=0), state, True)[1], first)
    assert not torch.equal(rule.limits(5.0 * x, PerChannel(axis=0), state, True)[1], first)


def test_zero_channels_give_zeros_and_keep_their_state():
    quantizer = Quantizer(grid=Symmetric(), range=MagnitudeClip(), grain="channel:0", rounding="stochastic")
    state = quantizer.init_state(3)
    x = torch.stack([samples("gaussian", 512), torch.zeros(512), samples("inverted_t", 512)])
    values = quantizer.quantize(x, state=state).dequantize()
    assert bool((values[1] == 0).all())
    assert math.isnan(float(state["clip"][1]))  # not started yet
    known = state["clip"].clone()
    quantizer.quantize(torch.zeros(3, 512), state=state)
    assert torch.equal(state["clip"][[0, 2]], known[[0, 2]])
    x[1] = samples("gaussian", 512)
    assert bool(torch.isfinite(quantizer.quantize(x, state=state).dequantize()).all())
    assert float(state["clip"][1]) == float(x[1].abs().max())


def test_non_finite_channels_leave_the_state_alone():
    rule = MagnitudeClip()
    state = rule.init_state(2)
    x = torch.stack([samples("gaussian", 512), samples("inverted_t", 512)])
    rule.limits(x, PerChannel(axis=0), state, True)
    before = {name: value.clone() for name, value in state.items()}
    for bad in (math.nan, math.inf):
        y = 7 * x
        y[1, 5] = bad
        low, high = rule.limits(y, PerChannel(axis=0), state, True)
        assert bool(torch.isnan(low[1]) & torch.isnan(high[1]))
        assert bool(torch.isfinite(high[0]))
        assert torch.equal(state["clip"], before["clip"])  # the other channel does not learn from such a step either
    assert torch.equal(state["age"], before["age"])


def test_no_update_changes_nothing():
    rule = MagnitudeClip()
    state = rule.init_state(1)
    rule.limits(samples("inverted_t", 512), PerTensor(), state, False)
    assert math.isnan(float(state["clip"]))
    assert int(state["age"]) == 0


@pytest.mark.parametrize(
    "options",
    [{"threshold": 1.5}, {"k": 0.0}, {"a": -1.0}, {"k": 3.0}, {"rule": "best"}, {"alpha": 0.0}, {"update_interval": 0}],
)
def test_illegal_arguments(options):
    with pytest.raises(ArgumentError, match="MagnitudeClip"):
        MagnitudeClip(**options)
