"""Quantizers: unbiased, reproducible, and at ease with degenerate input.

Each z-test fails an honest quantizer with probability 1e-6 on a fresh seed; seeds are fixed.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gradbits.core.errors import ArgumentError, DtypeError, GradbitsError
from gradbits.core.grain import Grain, PerBlock, PerChannel, PerRow, PerTensor
from gradbits.core.noise import NoiseKey
from gradbits.quantizers.grids import Affine, Grid, Symmetric
from gradbits.quantizers.quantizer import Quantizer
from gradbits.quantizers.ranges import EMA, AbsMax, MinMax

ALARM = 1e-6
GRIDS: list[Grid] = [Symmetric(bits=8), Symmetric(bits=2), Affine(bits=4), Affine(bits=3, zero="widen")]
GRAINS: list[Grain] = [PerTensor(), PerRow(), PerChannel(axis=-1), PerBlock(size=6)]


def rule_of(grid: Grid) -> AbsMax | MinMax:
    return AbsMax() if isinstance(grid, Symmetric) else MinMax()


def many_draws(q: Quantizer, x: torch.Tensor, draws: int) -> torch.Tensor:
    """Dequantized copies of ``x`` [draws, 5, 7] from one call: copies stand where they leave every scale as it is."""
    beside = isinstance(q.grain, PerRow)
    out = q.quantize(x.repeat(1, draws) if beside else x.repeat(draws, 1), noise=NoiseKey.of(1)).dequantize().double()
    return out.view(5, draws, 7).transpose(0, 1) if beside else out.view(draws, 5, 7)


@pytest.mark.parametrize("grain", [PerTensor(), PerRow(), PerChannel(axis=1), PerBlock(size=7)], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_stochastic_rounding_is_unbiased_with_the_known_variance(grid, grain):
    draws, rng = 20_000, torch.Generator().manual_seed(0)
    x = torch.randn(5, 7, generator=rng) * torch.exp(torch.randn(5, 1, generator=rng))
    q = Quantizer(grid=grid, grain=grain, range=rule_of(grid), rounding="stochastic")
    values, first = many_draws(q, x, draws), q.quantize(x)
    scale = grain.expand(first.scale, x.shape).expand(x.shape).double()
    low = first.zero_value()
    low = torch.zeros(()) if low is None else grain.expand(low, x.shape)
    f = torch.remainder((x.double() - low.double()) / scale, 1.0)
    variance = scale**2 * f * (1 - f)
    free = f * (1 - f) * draws > 20  # enough of both neighbours for the normal approximation
    assert int(free.sum()) > x.numel() // 2
    z = ((values.mean(0) - x.double()) / (variance / draws).sqrt())[free]
    assert stats.chi2.sf(float((z**2).sum()), z.numel()) > ALARM
    assert float(z.abs().max()) < stats.norm.isf(ALARM / 2 / z.numel())
    # elements of one draw err independently: the variance of the sum is the sum of variances
    error = (values - x.double()).flatten(1).sum(1)
    ratio = float(error.var()) / float(variance.sum())
    assert abs(ratio - 1.0) < 2 * stats.norm.isf(ALARM / 2) * (2 / draws) ** 0.5


def test_seeds_and_threads():
    q, x = Quantizer(rounding="stochastic"), torch.randn(300, 70)
    torch.manual_seed(3)
    a, b = q.quantize(x).codes, q.quantize(x).codes
    torch.manual_seed(3)
    assert torch.equal(q.quantize(x).codes, a)
    assert not torch.equal(a, b)
    before = torch.get_rng_state()
    Quantizer().quantize(x)
    q.quantize(x, noise=NoiseKey.of(1))
    assert torch.equal(torch.get_rng_state(), before)  # nearest rounding and given noise draw nothing


DEGENERATE = {
    "zero": torch.zeros(3, 4),
    "constant": torch.full((3, 4), 2.5),
    "negative constant": torch.full((3, 4), -1e-3),
    "one element": torch.tensor([[0.7]]),
    "no axes": torch.tensor(-3.0),
    "empty": torch.empty(0, 4),
    "empty inside": torch.empty(3, 0),
    "tiny": torch.tensor([[1e-30, -2e-30], [0.0, 5e-31]]),
    "subnormal": torch.tensor([[1e-40, -3e-40], [0.0, 1e-45]]),
    "huge": torch.tensor([[1e30, -2e30], [0.0, 5e29]]),
    "mixed": torch.tensor([[1e30, 1e-30], [0.0, -1.0]]),
    "transposed": torch.arange(12.0).view(3, 4).t(),
    "expanded": torch.tensor([[1.0, -2.0]]).expand(3, 2),
    "sliced": torch.arange(24.0).view(4, 6)[::2, 1::2],
    "one sided": torch.tensor([[5.0, 6.0], [7.0, 5.5]]),
}
RULES = {"batch": rule_of, "ema": lambda grid: EMA(of=rule_of(grid))}


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_input(name, rule, rounding):
    x = DEGENERATE[name]
    for grid, grain in itertools.product([*GRIDS, Affine(bits=8, zero="nudge")], GRAINS):
        if isinstance(grain, PerChannel) and x.dim() == 0:
            continue
        q = Quantizer(grid=grid, grain=grain, range=RULES[rule](grid), rounding=rounding)
        state = q.init_state(torch.Size(grain.scale_shape(x.shape)).numel())
        for _ in range(2):
            out = q.quantize(x, noise=NoiseKey.of(0), state=state or None)
            back = out.dequantize()
            assert back.shape == x.shape
            assert bool(torch.isfinite(back).all()), (grid, grain)
            step = grain.expand(out.scale, x.shape)
            reach = 1.5 if getattr(grid, "zero", "") == "nudge" else 1.0
            assert bool(((back - x).abs() <= step * reach * 1.01 + x.abs() * 1e-5).all()), (grid, grain)
            assert torch.equal(out.pack().dequantize(), back)
        if name in ("zero", "constant", "one element") and getattr(grid, "zero", "none") == "none":
            assert torch.allclose(back, x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("grain", GRAINS, ids=str)
def test_other_dtypes_are_computed_in_float32(dtype, grain):
    x = torch.randn(4, 6).to(dtype)
    for grid in GRIDS:
        q = Quantizer(grid=grid, grain=grain, range=rule_of(grid), rounding="stochastic")
        a, b = (q.quantize(t, noise=NoiseKey.of(5)) for t in (x, x.float()))
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.scale, b.scale)
        assert a.dequantize().dtype == dtype
        assert torch.equal(a.dequantize(), b.dequantize().to(dtype))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
    grid=st.sampled_from(GRIDS),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_each_group_is_quantized_as_if_alone(shape, grid, seed, data):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    grain = data.draw(st.sampled_from([PerRow(), PerChannel(axis=-1), PerBlock(size=3)]))
    q, alone = (Quantizer(grid=grid, grain=g, range=rule_of(grid)) for g in (grain, PerTensor()))
    parts = grain.split(q.quantize(x).codes).reshape(-1, grain.split(x).shape[-1])
    for part, codes in zip(grain.split(x).reshape(parts.shape), parts, strict=True):
        assert torch.equal(alone.quantize(part).codes, codes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("grid", [*GRIDS, Affine(bits=8, zero="nudge")], ids=str)
def test_what_is_not_finite_propagates(grid, bad):
    x = torch.randn(3, 4)
    x[1, 2] = bad
    for rounding in ("nearest", "stochastic"):
        whole = Quantizer(grid=grid, range=rule_of(grid), rounding=rounding).quantize(x).dequantize()
        assert bool(torch.isnan(whole).all())
        rows = Quantizer(grid=grid, range=rule_of(grid), grain="row", rounding=rounding).quantize(x).dequantize()
        assert torch.isnan(rows).any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.complex64])
def test_only_real_floating_point(dtype):
    with pytest.raises(DtypeError, match="x: dtype"):
        Quantizer().quantize(torch.zeros(3).to(dtype))


def test_a_rule_that_remembers_needs_its_state():
    with pytest.raises(ArgumentError, match="EMA remembers"):
        Quantizer(range=EMA()).quantize(torch.ones(2))


@pytest.mark.parametrize(
    "options",
    [
        {"rounding": "up"},
        {"rounding": None},
        {"grain": "rows"},
        {"grain": 3},
        {"grid": 8},
        {"grid": "symmetric"},
        {"grid": PerTensor()},
        {"range": "absmax"},
        {"range": None},
        {"estimator": "ste"},
        {"rows": "batch"},
        {"rotation": "hadamard"},
    ],
    ids=str,
)
def test_illegal_parts(options):
    with pytest.raises(GradbitsError, match=next(iter(options))):
        Quantizer(**options)
