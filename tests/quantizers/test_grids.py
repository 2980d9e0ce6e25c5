"""Grids: exact zeros, error bounds, legal codes, for every number of bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradbits.core.errors import ArgumentError
from gradbits.quantizers.grids import Affine, Grid, Symmetric
from gradbits.quantizers.quantizer import Quantizer
from gradbits.quantizers.ranges import MinMax

GRIDS: list[tuple[type[Grid], dict[str, str]]] = [
    (Symmetric, {}),
    (Affine, {"zero": "none"}),
    (Affine, {"zero": "nudge"}),
    (Affine, {"zero": "widen"}),
]
IDS = ["symmetric", "none", "nudge", "widen"]
BITS = st.integers(2, 8)
HUGE = float(torch.tensor(1e30))
FLOATS = st.floats(-HUGE, HUGE, width=32)
VALUES = st.lists(FLOATS, min_size=1, max_size=30)
SMALL = st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=30)


def legal(bits: int, grid: Grid) -> tuple[int, int]:
    half = 1 << (bits - 1)
    return (1 - half if isinstance(grid, Symmetric) else -half), half - 1


@pytest.mark.parametrize(("kind", "options"), GRIDS, ids=IDS)
@settings(max_examples=150, deadline=None)
@given(bits=BITS, values=st.one_of(VALUES, SMALL), rounding=st.sampled_from(["nearest", "stochastic"]))
def test_codes_are_legal_and_close(kind, options, bits, values, rounding):
    grid = kind(bits=bits, **options)
    x = torch.tensor(values)
    torch.manual_seed(0)
    q = Quantizer(grid=grid, range=MinMax(), rounding=rounding).quantize(x)
    low, high = legal(bits, grid)
    assert low <= int(q.codes.min())
    assert int(q.codes.max()) <= high
    back, scale = q.dequantize(), float(q.scale)
    assert bool(torch.isfinite(back).all())
    reach = 0.5 if rounding == "nearest" else 1.0
    if options.get("zero") == "nudge":
        reach += 0.5  # the shifted end clips by up to half a step
    largest = float(x.abs().max())
    tiny = 2e-38  # below the normal numbers of float32 one step is one step
    assert float((back.double() - x.double()).abs().max()) <= scale * reach * (1 + 1e-4) + 3e-6 * largest + tiny


@pytest.mark.parametrize(("kind", "options"), GRIDS, ids=IDS)
@settings(max_examples=100, deadline=None)
@given(bits=BITS, values=SMALL)
def test_zero_is_exact_where_promised(kind, options, bits, values):
    if options.get("zero") == "none":
        options = {"zero": "widen"}
    x = torch.tensor([*values, 0.0])
    for rounding in ("nearest", "stochastic"):
        q = Quantizer(grid=kind(bits=bits, **options), range=MinMax(), rounding=rounding).quantize(x)
        assert q.dequantize()[-1].item() == 0.0
        if q.zero_point is not None:
            assert float(q.zero_point) == round(float(q.zero_point))
            assert -(1 << (bits - 1)) <= float(q.zero_point) < 1 << (bits - 1)


@settings(max_examples=100, deadline=None)
@given(bits=BITS, values=SMALL)
def test_symmetric_is_idempotent_and_odd(bits, values):
    quantizer = Quantizer(grid=Symmetric(bits=bits))
    x = torch.tensor(values)
    q = quantizer.quantize(x)
    assert torch.equal(quantizer.quantize(-x).codes, -q.codes)
    if float(x.abs().max()) > 1e-35:
        assert int(q.codes.abs().max()) == (1 << (bits - 1)) - 1
    assert torch.equal(quantizer.quantize(q.dequantize()).codes, q.codes)


@settings(max_examples=100, deadline=None)
@given(bits=BITS, values=SMALL)
def test_ends_of_a_plain_affine_range_are_codes(bits, values):
    x = torch.tensor(values)
    q = Quantizer(grid=Affine(bits=bits), range=MinMax()).quantize(x)
    half = 1 << (bits - 1)
    assert int(q.codes[x.argmin()]) == -half
    if float(x.max() - x.min()) > 1e-30:
        assert int(q.codes[x.argmax()]) == half - 1


@settings(max_examples=150, deadline=None)
@given(bits=BITS, low=st.floats(-100, 0, width=32), high=st.floats(0, 100, width=32))
def test_widened_range_holds_both_ends(bits, low, high):
    placed = Affine(bits=bits, zero="widen").place(torch.tensor([low]), torch.tensor([high]))
    plain = Affine(bits=bits, zero="nudge").place(torch.tensor([low]), torch.tensor([high]))
    half, scale = 1 << (bits - 1), placed.scale.double().item()
    rank = placed.zero_point.item() + half
    assert scale >= plain.scale.item() * (1 - 1e-6)
    steps = 2 * half - 1
    assert -rank * scale <= low + 1e-5 * scale * steps
    assert (steps - rank) * scale >= high - 1e-5 * scale * steps


@settings(max_examples=150, deadline=None)
@given(bits=BITS, low=st.floats(-1e6, 1e6, width=32), width=st.floats(0, 1e6, width=32))
def test_nudged_range_is_the_papers(bits, low, width):
    """Jacob et al. in float64: extend to hold zero, round half up to the nearest code, clamp."""
    high = torch.tensor(low) + torch.tensor(width)
    placed = Affine(bits=bits, zero="nudge").place(torch.tensor([low]), high.view(1))
    a, b, steps = min(low, 0.0), max(float(high), 0.0), (1 << bits) - 1
    if b - a < 1e-30:
        return
    exact = -a * steps / (b - a)
    rank = placed.zero_point.item() + (1 << (bits - 1))
    assert abs(rank - exact) <= 0.5 + 1e-9
    assert placed.scale.item() == pytest.approx((b - a) / steps, rel=1e-6)


@pytest.mark.parametrize(("kind", "options"), GRIDS, ids=IDS)
@pytest.mark.parametrize("bits", [1, 9, 0, -1, True, 4.0, "8", None])
def test_illegal_bits(kind, options, bits):
    with pytest.raises(ArgumentError, match=rf"{kind.__name__}\.bits="):
        kind(bits=bits, **options)


@pytest.mark.parametrize("zero", ["", "exact", None, True, 0])
def test_unknown_zero(zero):
    with pytest.raises(ArgumentError, match=r"Affine\.zero="):
        Affine(zero=zero)


@pytest.mark.parametrize(("kind", "options"), GRIDS, ids=IDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_range_that_is_not_finite_gives_nan(kind, options, bad):
    low, high = torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 1.0])
    (low if bad < 0 else high)[1] = bad
    placed = kind(**options).place(low, high)
    assert bool(torch.isfinite(placed.scale[0]))
    assert bool(torch.isnan(placed.scale[1]))
    assert bool(torch.isfinite(placed.code_map.inverse[0]))
