"""Fixed-point multipliers against exact rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradbits.core.errors import ArgumentError
from gradbits.kernels.fixed_point import (
    Multiplier,
    common_multipliers,
    high_multiply,
    requantize,
    rounding_shift,
)

INT32 = st.integers(-(1 << 31) + 1, (1 << 31) - 1)
REALS = st.floats(2.0**-40, 2.0**20, exclude_max=True, allow_subnormal=False)


def half_away(value: Fraction) -> int:
    whole = abs(value) + Fraction(1, 2)
    return int(whole) if value >= 0 else -int(whole)


@given(REALS)
def test_multiplier_is_the_nearest(real):
    m = Multiplier.of(real)
    if int(m.m0) == 0:
        assert real < 2.0**-31
        return
    assert 1 << 30 <= int(m.m0) < 1 << 31
    value = Fraction(int(m.m0)) / (Fraction(2) ** (31 + int(m.shift)))
    assert abs(value - Fraction(real)) <= value / 2**31


@given(st.lists(INT32, min_size=1), REALS)
def test_one_rounding_is_exact(totals, real):
    m = Multiplier.of(real)
    got = requantize(torch.tensor(totals), m)
    exact = Fraction(int(m.m0)) / Fraction(2) ** (31 + int(m.shift))
    assert got.tolist() == [half_away(total * exact) for total in totals]


@given(st.lists(st.integers(-(1 << 24), 1 << 24), min_size=1), st.floats(1e-6, 0.9999))
def test_both_roundings_are_close_to_the_real_product(totals, real):
    x = torch.tensor(totals)
    for rounding, limit in (("single", 0.51), ("double", 1.01)):
        error = requantize(x, Multiplier.of(real), rounding).double() - x.double() * real
        assert float(error.abs().max()) <= limit


def test_minus_one_and_a_half_goes_away_from_zero():
    """A plain shift would give -1: the upward bias that the paper warns of."""
    assert rounding_shift(torch.tensor([-12, 12, -4, 4]), 3).tolist() == [-2, 2, -1, 1]
    assert rounding_shift(torch.tensor([3, -3]), 1).tolist() == [2, -2]
    assert rounding_shift(torch.tensor([5, -5]), 0).tolist() == [5, -5]


@given(INT32, INT32)
def test_high_multiply(a, b):
    got = int(high_multiply(torch.tensor(a), torch.tensor(b)))
    assert abs(Fraction(got) - Fraction(a * b, 1 << 31)) <= Fraction(1, 2)


def test_the_multipliers_of_the_paper_s_examples():
    for real, shift in ((0.1, 3), (0.0073, 7), (0.5, 0), (1e-6, 19)):
        assert int(Multiplier.of(real).shift) == shift
    assert int(requantize(torch.tensor(1000), Multiplier.of(0.1))) == 100


@given(st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=4))
def test_common_multipliers(reals):
    integers, shift = common_multipliers(reals)
    assert 1 << 30 <= max(integers) < 1 << 31
    for integer, real in zip(integers, reals, strict=True):
        assert abs(integer / 2.0**shift - real) <= 0.5 / 2.0**shift


@pytest.mark.parametrize("real", [0.0, -0.5, float("nan"), float("inf"), 2.0**30])
def test_what_is_no_multiplier(real):
    with pytest.raises(ArgumentError, match="positive, finite"):
        Multiplier.of(real)
    with pytest.raises(ArgumentError, match="positive"):
        common_multipliers([real])


def test_an_unknown_rounding():
    with pytest.raises(ArgumentError, match="rounding='up'"):
        requantize(torch.tensor(1), Multiplier.of(0.5), "up")
