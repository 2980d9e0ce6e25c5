"""Direction-sensitive clipping: the deviation it minimises, when it searches, and what never moves its state."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradbits.core.errors import GradbitsError
from gradbits.core.grain import PerChannel, PerRow, PerTensor
from gradbits.core.noise import NoiseKey
from gradbits.quantizers import direction_clip as module
from gradbits.quantizers.direction_clip import (
    DirectionClip,
    Magnitudes,
    deviation,
    expected_deviation,
    search_descent,
    search_grid,
)
from gradbits.quantizers.grids import Symmetric
from gradbits.quantizers.quantizer import Quantizer


def spiky(count: int = 20_000, peak: float = 300.0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.cat([torch.randn(count, generator=rng), torch.tensor([peak])])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("clip", [2.0, 20.0, 100.0, 300.0])
def test_expected_deviation_is_what_rounding_gives(bits, clip):
    g, levels = spiky(), (1 << (bits - 1)) - 1
    torch.manual_seed(0)
    step = clip / levels
    v = torch.rand(50, g.numel()) - 0.5
    rounded = torch.round(g.clamp(-clip, clip) / step + v) * step
    measured = sum(deviation(g, row) for row in rounded) / 50
    assert expected_deviation(Magnitudes.of(g), clip, levels) == pytest.approx(measured, rel=0.02, abs=1e-4)


def test_the_histogram_is_close_to_every_element(monkeypatch):
    g = spiky(60_000)
    rough = [expected_deviation(Magnitudes.of(g), c) for c in (5.0, 50.0, 300.0)]
    monkeypatch.setattr(module, "HISTOGRAM_FROM", 10**9)
    exact = [expected_deviation(Magnitudes.of(g), c) for c in (5.0, 50.0, 300.0)]
    assert rough == pytest.approx(exact, rel=0.02)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=20), st.floats(0.01, 20))
def test_deviation_is_bounded_and_scale_free(values, clip):
    g = torch.tensor(values)
    d = expected_deviation(Magnitudes.of(g), clip)
    assert 0.0 <= d <= 2.0
    assert deviation(g, g) == pytest.approx(0.0, abs=1e-12)
    assert expected_deviation(Magnitudes.of(g * 4), clip * 4) == pytest.approx(d, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("search", ["grid", "descent"])
def test_both_searches_do_at_least_as_well_as_no_clipping(search):
    for g in (spiky(), torch.randn(3000), torch.randn(500) ** 5, torch.tensor([1.0, -2.0])):
        m, largest = Magnitudes.of(g), float(g.abs().max())
        clip = search_grid(m, largest) if search == "grid" else search_descent(g, largest, largest)
        assert 0 < clip <= largest * (1 + 1e-6)
        # descent follows a derivative that is only nearly right near the optimum
        slack = 0.0 if search == "grid" else 0.05 * expected_deviation(m, largest) + 1e-4
        assert expected_deviation(m, clip) <= expected_deviation(m, largest) + slack


def test_the_interior_optimum_of_a_spike():
    g = spiky(200_000)
    assert 85 < search_grid(Magnitudes.of(g), 300.0) < 120
    # the straight-through derivative changes sign somewhat above the optimum
    assert 85 < search_descent(g, 300.0, 300.0) < 180


def test_fewer_bits_clip_deeper():
    g = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    clips = {}
    for bits in (8, 4):
        q = Quantizer(grid=Symmetric(bits=bits), range=DirectionClip())
        state = q.init_state()
        q.quantize(g, state=state)
        clips[bits] = float(state["clip"])
        levels = (1 << (bits - 1)) - 1
        best = expected_deviation(Magnitudes.of(g), clips[bits], levels)
        assert best == pytest.approx(float(state["deviation"]), rel=1e-5)
        around = (expected_deviation(Magnitudes.of(g), clips[bits] * f, levels) for f in (0.8, 1.25))
        assert best <= min(around)
    assert clips[4] < 0.8 * clips[8]


def test_refresh_every_t_steps():
    rule = DirectionClip(refresh=3, guard=100.0)
    state = rule.init_state(1)
    seen = []
    for step in range(7):
        rule.limits(spiky(2000) * (1 + step / 10), PerTensor(), state, True)
        seen.append((float(state["clip"]), float(state["deviation"])))
    assert seen[0] == seen[1] == seen[2] != seen[3]
    assert seen[3] == seen[4] == seen[5] != seen[6]


def test_a_jump_of_the_gradient_is_met_at_once():
    rule = DirectionClip(refresh=1000)
    state = rule.init_state(1)
    rule.limits(torch.randn(500), PerTensor(), state, True)
    before = float(state["clip"])
    rule.limits(torch.randn(500) * 1.5, PerTensor(), state, True)
    assert float(state["clip"]) == before
    rule.limits(torch.randn(500) * 1000, PerTensor(), state, True)
    assert float(state["clip"]) > 100 * before


def test_the_range_never_exceeds_the_values():
    rule = DirectionClip(refresh=1000)
    state = rule.init_state(1)
    rule.limits(torch.randn(500), PerTensor(), state, True)
    _, high = rule.limits(torch.full((5,), 1e-3), PerTensor(), state, True)
    assert float(high) == pytest.approx(1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("started", [True, False])
def test_state_is_untouched_by_what_is_not_finite(bad, started):
    rule = DirectionClip(refresh=1)
    state = rule.init_state(1)
    if started:
        rule.limits(torch.randn(50), PerTensor(), state, True)
    before = {k: v.clone() for k, v in state.items()}
    g = torch.randn(50)
    g[7] = bad
    low, high = rule.limits(g, PerTensor(), state, True)
    assert not math.isfinite(float(low))
    assert not math.isfinite(float(high))
    for key, value in state.items():
        assert torch.equal(value.nan_to_num(-7.0), before[key].nan_to_num(-7.0))


@pytest.mark.parametrize("search", ["grid", "descent"])
@pytest.mark.parametrize("count", [1, 10, 600])
@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-37, 1e-30, 1.0, 1e30])
def test_degenerate_gradients(search, count, size, monkeypatch):
    monkeypatch.setattr(module, "HISTOGRAM_FROM", 500)
    q = Quantizer(range=DirectionClip(search=search), rounding="stochastic")
    state = q.init_state()
    for g in (torch.full((count,), size), torch.randn(count).clamp(-8, 8) * size):
        back = q.quantize(g, noise=NoiseKey.of(0), state=state).dequantize()
        assert bool(torch.isfinite(back).all())
        assert 0.0 <= float(state["deviation"]) <= 2.0
    if size == 0.0:
        assert bool(state["clip"].isnan())


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
@pytest.mark.parametrize("grain", [PerTensor(), PerRow(), PerChannel(axis=-1)], ids=str)
def test_empty_gradients(shape, grain):
    q = Quantizer(range=DirectionClip(), grain=grain)
    assert q.quantize(torch.empty(shape), state=q.init_state()).dequantize().shape == torch.Size(shape)


@pytest.mark.parametrize(
    "options", [{"refresh": 0}, {"refresh": True}, {"refresh": 1.5}, {"search": "best"}, {"guard": 1.0}, {"guard": "x"}]
)
def test_illegal_options(options):
    with pytest.raises(GradbitsError, match=f"DirectionClip.{next(iter(options))}="):
        DirectionClip(**options)
