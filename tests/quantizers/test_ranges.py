"""Range rules: what they give, what they remember, and what never touches their memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradbits.core.errors import GradbitsError
from gradbits.core.grain import PerBlock, PerChannel, PerRow, PerTensor
from gradbits.quantizers.ranges import EMA, AbsMax, MinMax, min_max

GRAINS = [PerTensor(), PerRow(), PerChannel(axis=1), PerBlock(size=5)]
BAD = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("grain", GRAINS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("order", ["contiguous", "transposed", "sliced"])
def test_min_max_is_that_of_each_group(grain, dtype, order):
    x = torch.randn(6, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = {"contiguous": x, "transposed": x.t().contiguous().t(), "sliced": torch.cat([x, x], 1)[:, ::2]}[order]
    low, high = min_max(x, grain)
    assert low.dtype == high.dtype == torch.float32
    assert low.shape == torch.Size(grain.scale_shape(x.shape))
    parts = list(grain.split(x).flatten(0, -2))
    assert low.flatten().tolist() == [float(p.min()) for p in parts]
    assert high.flatten().tolist() == [float(p.max()) for p in parts]


@pytest.mark.parametrize("grain", GRAINS, ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_empty_is_zero(grain, shape):
    for t in min_max(torch.empty(shape), grain):
        assert t.shape == torch.Size(grain.scale_shape(shape))
        assert not t.any()


def test_abs_max_is_symmetric():
    low, high = AbsMax().limits(torch.tensor([[1.0, -3.0], [2.0, 0.5]]), PerRow(), {}, True)
    assert low.flatten().tolist() == [-3.0, -2.0]
    assert high.flatten().tolist() == [3.0, 2.0]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=8), st.floats(0, 0.999))
def test_ema_follows_its_formula(batches, decay):
    rule, known = EMA(decay=decay, of=MinMax()), None
    state = rule.init_state(1)
    for value in batches:
        x = torch.tensor([value, value + 1.0])
        low, high = rule.limits(x, PerTensor(), state, True)
        a, b = float(x[0]), float(x[1])
        known = known or (a, b)
        known = (known[0] + (1 - decay) * (a - known[0]), known[1] + (1 - decay) * (b - known[1]))
        assert (float(low), float(high)) == pytest.approx(known, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("bad", BAD)
def test_ema_is_untouched_by_what_is_not_finite(bad):
    rule, x = EMA(of=MinMax()), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for first in (True, False):  # before anything was seen, and after
        state = rule.init_state(2)
        if not first:
            rule.limits(x, PerChannel(axis=1), state, True)
        before = {k: v.clone() for k, v in state.items()}
        poisoned = x.clone()
        poisoned[0, 1] = bad
        low, high = rule.limits(poisoned, PerChannel(axis=1), state, True)
        assert torch.isnan(low[0, 1])
        assert torch.isnan(high[0, 1])
        assert bool(torch.isfinite(low[0, 0]))
        for key, value in state.items():  # the other channel does not learn from such a step either
            assert torch.equal(value.nan_to_num(-7), before[key].nan_to_num(-7))


def test_ema_only_changes_when_it_may():
    rule = EMA(decay=0.5)
    state = rule.init_state(1)
    rule.limits(torch.ones(3), PerTensor(), state, False)
    assert bool(state["low"].isnan().all())
    rule.limits(torch.ones(3), PerTensor(), state, True)
    assert state["high"].tolist() == [1.0]
    low, high = rule.limits(torch.full((3,), 9.0), PerTensor(), state, False)
    assert (float(low), float(high)) == (-1.0, 1.0)
    rule.limits(torch.empty(0), PerTensor(), state, True)
    assert state["high"].tolist() == [1.0]


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan"), "0.9", True, None])
def test_illegal_decay(decay):
    with pytest.raises(GradbitsError, match=r"EMA\.decay="):
        EMA(decay=decay)
