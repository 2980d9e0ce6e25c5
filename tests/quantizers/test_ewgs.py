"""EWGS: the discretizer and its gradient in closed form, and the learned intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradbits.core.errors import ArgumentError, DtypeError
from gradbits.core.grain import PerTensor
from gradbits.quantizers.ewgs import EWGS, discretize, scale_gradient
from gradbits.quantizers.interval import ActivationInterval, UnitInterval, WeightInterval, open_interval
from gradbits.quantizers.quantizer import Quantizer
from gradbits.quantizers.ranges import RangeRule

LEVELS = st.integers(2, 256)
UNIT = st.floats(0.0, 1.0, width=32)


@dataclass(frozen=True, kw_only=True)
class Fixed(RangeRule):
    """A range that is given."""

    low: float
    high: float

    def limits(self, x, grain, state, update):
        shape = grain.scale_shape(x.shape)
        return torch.full(shape, self.low), torch.full(shape, self.high)


def gradient(x: float, g: float, levels: int, delta: float) -> float:
    t = torch.tensor([x], requires_grad=True)
    discretize(t, levels, delta).backward(torch.tensor([g]))
    return t.grad.item()


@pytest.mark.parametrize(
    ("levels", "x", "delta", "g", "want"),
    [
        (4, 0.4, 0.5, 2.0, 2.0666667),
        (4, 0.4, 0.5, -2.0, -1.9333333),
        (2, 0.9, 1.0, 1.0, 0.9),
        (2, 0.9, 1.0, -1.0, -1.1),
        (2, 0.49, 1.0, 1.0, 1.49),
        (2, 0.49, 1.0, 0.0, 0.0),
    ],
)
def test_known_values(levels, x, delta, g, want):
    assert gradient(x, g, levels, delta) == pytest.approx(want, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(LEVELS, st.lists(UNIT, min_size=1, max_size=20))
def test_rounding_is_near_and_idempotent(levels, values):
    x = torch.tensor(values)
    y = discretize(x, levels)
    assert float((y - x).abs().max()) <= 0.5 / (levels - 1) + 1e-6
    assert torch.equal(discretize(y, levels), y)
    assert discretize(torch.tensor([0.0, 1.0]), levels).tolist() == [0.0, 1.0]


@settings(max_examples=60, deadline=None)
@given(LEVELS, UNIT, st.floats(-4, 4, width=32), st.floats(0.0, 3.0))
def test_the_gradient_grows_where_it_points_to_the_value_and_shrinks_elsewhere(levels, x, g, delta):
    got = gradient(x, g, levels, delta)
    error = x - float(discretize(torch.tensor([x]), levels))
    bound = delta / (2 * (levels - 1))
    assert abs(g) * (1 - bound) - 1e-5 <= got * math.copysign(1.0, g) <= abs(g) * (1 + bound) + 1e-5
    if g * error * delta > 1e-4:
        assert abs(got) > abs(g)
    if g * error * delta < -1e-4 and bound < 1:
        assert abs(got) < abs(g)
    assert gradient(x, 2 * g, levels, delta) == pytest.approx(2 * got, rel=1e-5, abs=1e-12)


def test_delta_zero_is_the_straight_through_estimator_bit_for_bit():
    g = torch.randn(1000)
    x = torch.rand(1000)
    assert torch.equal(scale_gradient(g, x, discretize(x, 4), 0.0), g)


@pytest.mark.parametrize("levels", [1, 0, True, 2.0])
def test_levels_that_are_none(levels):
    with pytest.raises((ArgumentError, DtypeError), match="levels"):
        discretize(torch.rand(3), levels)


@pytest.mark.parametrize("delta", [-0.1, float("nan"), float("inf")])
def test_deltas_that_are_none(delta):
    with pytest.raises(ArgumentError, match="delta"):
        discretize(torch.rand(3), 4, delta)
    with pytest.raises(ArgumentError, match="delta"):
        WeightInterval(delta=delta)


def test_values_outside_the_unit_interval_are_refused():
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(ArgumentError, match="normalise"):
            discretize(torch.tensor([0.5, value]), 4)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("signed", [False, True])
def test_levels_of_the_grid(bits, signed):
    n = 1 << bits
    placed = UnitInterval(bits=bits, signed=signed).place(torch.tensor([-1.0]), torch.tensor([3.0]))
    x = torch.linspace(-1.0, 3.0, n)
    q = Quantizer(grid=UnitInterval(bits=bits, signed=signed), range=Fixed(low=-1.0, high=3.0)).quantize(x)
    assert q.codes.tolist() == list(range(-(n // 2), n // 2))
    assert (placed.zero_point is None) is signed
    want = torch.linspace(-1.0 if signed else 0.0, 1.0, n)
    assert torch.allclose(q.dequantize(), want, atol=1e-6)
    assert torch.equal(q.pack().dequantize(), q.dequantize())
    if signed:  # symmetric about zero, which is never a level
        assert torch.allclose(q.dequantize(), -q.dequantize().flip(0), atol=1e-6)
        assert float(q.dequantize().abs().min()) > 0.9 / (n - 1)
    if bits == 1:
        assert q.dequantize().tolist() == ([-1.0, 1.0] if signed else [0.0, 1.0])


def reference(x, low, high, factor, delta, bits, signed):
    """The same by autograd, with a discretizer of its own."""
    xn = ((x - low) / (high - low)).clamp(0, 1)
    xq = discretize(xn, 1 << bits, delta)
    return factor.abs() * (2 * xq - 1) if signed else xq


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("delta", [0.0, 0.3])
def test_gradients_are_those_of_the_formulas(signed, delta):
    torch.manual_seed(0)
    x, g = torch.randn(40, 7, dtype=torch.float64).float(), torch.randn(40, 7)
    values = [v.requires_grad_() for v in (x.clone(), torch.tensor([-0.7]), torch.tensor([0.9]), torch.tensor([-1.3]))]
    reference(*values, delta, 2, signed).backward(g)
    rule = WeightInterval(delta=delta) if signed else ActivationInterval(delta=delta)
    state = rule.init_state(1)
    state["low"].fill_(-0.7)
    state["high"].fill_(0.9)
    state["started"].fill_(1)
    if signed:
        state["output_scale"].fill_(-1.3)
    grid = UnitInterval(bits=2, signed=signed)
    got, learned = EWGS(normalise=False).backward(x, g, grid, PerTensor(), state)
    assert torch.allclose(got, values[0].grad, rtol=1e-5, atol=1e-7)
    for name, value in zip(("low", "high", "output_scale"), values[1:], strict=True):
        if name in learned:
            assert torch.allclose(learned[name], value.grad, rtol=1e-4, atol=1e-6), name
    assert set(learned) == set(rule.learned)
    _, normalised = EWGS().backward(x, g, grid, PerTensor(), state)
    assert float(normalised["high"]) == pytest.approx(float(learned["high"]) / math.sqrt(x.numel() * 3), rel=1e-5)


def test_saturated_values_get_no_gradient_and_give_none():
    state = ActivationInterval().init_state(1)
    state["started"].fill_(1)
    x = torch.tensor([-0.5, 0.0, 0.4, 1.0, 1.5])
    grad, learned = EWGS(normalise=False).backward(x, torch.ones(5), UnitInterval(bits=2), PerTensor(), state)
    assert grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    assert float(learned["high"]) == pytest.approx(-1.4)  # only the three inside
    assert float(learned["low"]) == pytest.approx(-1.6)


@pytest.mark.parametrize(
    "bad", [torch.full((4, 4), 0.3), torch.zeros(4, 4), torch.full((4, 4), float("nan")), torch.zeros(0, 4)]
)
def test_an_unusable_batch_does_not_start_an_interval(bad):
    for rule in (ActivationInterval(), WeightInterval()):
        q = Quantizer(grid=UnitInterval(bits=2), range=rule, estimator=EWGS())
        if isinstance(rule, WeightInterval):
            q = Quantizer(grid=UnitInterval(bits=2, signed=True), range=rule, estimator=EWGS())
        state = q.init_state()
        codes = q.quantize(bad, state=state)
        assert int(state["started"]) == 0
        assert codes.codes.shape == bad.shape
        q.quantize(torch.randn(50).abs(), state=state)
        assert int(state["started"]) == 1


def test_an_evaluation_starts_nothing():
    q = Quantizer(grid=UnitInterval(bits=2), range=ActivationInterval(), estimator=EWGS())
    state = q.init_state()
    before = {name: t.clone() for name, t in state.items()}
    x = torch.randn(100).abs()
    first = q.quantize(x, state=state, update=False)
    assert all(torch.equal(state[name], t) for name, t in before.items())
    assert torch.equal(first.codes, q.quantize(x, state=state).codes)


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (1.0, 0.5), (0.0, 0.0), (-1e30, -1e30), (1e-30, 1e-30)])
def test_an_interval_never_closes(low, high):
    a, b = open_interval(torch.tensor([low]), torch.tensor([high]))
    assert float(a) == pytest.approx(low)
    assert float(b) > float(a)
    placed = UnitInterval(bits=8).place(a, b)
    assert bool(torch.isfinite(placed.code_map.inverse).all())


def test_values_far_from_zero_start_at_their_extremes():
    state = ActivationInterval().init_state(1)
    x = 5.0 + 0.1 * torch.rand(200)
    ActivationInterval().limits_on(UnitInterval(bits=2), x, PerTensor(), state, True)
    assert float(state["low"]) == float(x.min())
    assert float(state["high"]) == float(x.max())
