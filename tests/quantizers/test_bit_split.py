"""Two signed digits: ranges, exactness at the maximum, unbiasedness."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradbits.core.errors import ArgumentError
from gradbits.quantizers.bit_split import BitSplit
from gradbits.quantizers.grids import Symmetric
from gradbits.quantizers.quantizer import Quantizer


def split(bits: int = 4, **options) -> Quantizer:
    return Quantizer(grid=BitSplit(bits=bits, **options), rounding="stochastic")


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 8), st.integers(1, 200), st.floats(0, 2), st.integers(0, 1000))
def test_digits(bits, count, sigma, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=g) * torch.exp(sigma * torch.randn(count, generator=g))
    q = split(bits).quantize(x)
    largest = (1 << (bits - 1)) - 1
    high, low = q.codes.int(), q.rest.codes.int()
    assert int(high.abs().max()) <= largest
    assert int(low.abs().max()) <= largest
    delta = float(x.abs().max()) / (2 * largest * largest)
    t = x.double() / delta
    total = 2 * largest * high + low
    assert float((total - t).abs().max()) < 1.0 + 1e-4 * 2 * largest**2
    top = int(x.abs().argmax())
    # float32 rounds t = 2 L^2, so at many bits the lower digit of the largest value is now and then one off
    assert float(q.dequantize()[top]) == pytest.approx(float(x[top]), rel=1e-5, abs=1.001 * delta if bits > 5 else 0.0)
    torch.testing.assert_close(q.dequantize().double(), delta * total.double(), rtol=1e-5, atol=1e-6 * delta)


def test_unbiased_over_the_whole_range():
    """Hoeffding-type bound for each of 4,001 values, false alarm 1e-6; variance at most Δ²/4."""
    x = torch.linspace(-1, 1, 4001)
    draws, mean, square = 800, torch.zeros(4001, dtype=torch.float64), torch.zeros(4001, dtype=torch.float64)
    torch.manual_seed(0)
    for _ in range(draws):
        error = (split().quantize(x).dequantize() - x).double()
        mean += error
        square += error**2
    delta = 1 / 98
    assert float((mean / draws).abs().max()) <= delta * math.sqrt(math.log(2 * 4001 / 1e-6) / (2 * draws))
    assert float((square / draws).max()) <= delta**2 / 4 * 1.2
    assert float(square.mean()) / draws == pytest.approx(delta**2 / 6, rel=0.05)


@pytest.mark.parametrize(("options", "bias"), [({"limit": 6}, 0.082), ({"top": 127.5}, 0.176)])
def test_the_official_limits_are_biased(options, bias):
    """What clamping to 6, or spreading 255 levels, takes off the largest value."""
    x = torch.linspace(-1, 1, 2001)
    torch.manual_seed(1)
    mean = torch.stack([split(**options).quantize(x).dequantize() - x for _ in range(60)]).mean(0)
    assert float(mean[-1]) == pytest.approx(-bias, abs=0.004)
    assert float(split().quantize(x).dequantize()[-1]) == pytest.approx(1.0, rel=1e-6)


def test_far_better_than_one_digit_on_heavy_tails():
    torch.manual_seed(2)
    x = torch.randn(128, 64) * torch.exp(1.5 * torch.randn(128, 1))
    one = Quantizer(grid=Symmetric(bits=4), rounding="stochastic").quantize(x).dequantize()
    two = split().quantize(x).dequantize()
    assert float((two - x).norm()) < 0.2 * float((one - x).norm())


@pytest.mark.parametrize(
    "x", [torch.zeros(5), torch.tensor(3.0), torch.full((2, 2), -1e-30), torch.tensor([1e30, -1e30])]
)
def test_degenerate(x):
    values = split().quantize(x).dequantize()
    assert values.shape == x.shape
    torch.testing.assert_close(values, x, rtol=1e-4, atol=0)


def test_non_finite_shows():
    assert bool(torch.isnan(split().quantize(torch.tensor([1.0, math.nan])).dequantize()).all())
    assert not bool(torch.isfinite(split().quantize(torch.tensor([1.0, math.inf])).dequantize()).any())


def test_packing_two_digits():
    x = torch.randn(7, 3)
    q = split().quantize(x)
    packed = q.pack()
    assert packed.codes.numel() == packed.rest.codes.numel() == 11
    assert torch.equal(packed.dequantize(), q.dequantize())
    assert [d.rest for d in q.digits()] == [None, None]
    torch.testing.assert_close(sum(d.dequantize() for d in q.digits()), q.dequantize())


def test_illegal_arguments():
    for options in ({"bits": 9}, {"limit": 8}, {"limit": 0}, {"top": -1.0}):
        with pytest.raises(ArgumentError):
            BitSplit(**options)
