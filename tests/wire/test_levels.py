"""Levels: the invariants of adaptive gradient quantization, and what entropy coding makes of their symbols."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from scipy import integrate
from scipy import stats as scipy_stats

from gradbits.core.noise import NoiseKey
from gradbits.kernels.huffman import code_lengths
from gradbits.wire.bucketed import separate, with_mirror
from gradbits.wire.codec import Payload
from gradbits.wire.density import Density
from gradbits.wire.entropy import Huffman, Zstd, plain
from gradbits.wire.levels import coordinate_descent, expected_variance, gradient
from gradbits.wire.methods.alq import ALQ
from gradbits.wire.methods.amq import AMQ
from gradbits.wire.methods.qsgd import QSGD
from gradbits.wire.multiplier import multiplier_gradient, power_grid

ONE = torch.ones(1, dtype=torch.float64)
MIXED = Density.of(torch.tensor([0.0, 0.1, -0.3]), torch.tensor([0.05, 0.2, 0.02]), torch.tensor([3.0, 1.0, 0.5]))


def normal_density(sigma: float, mu: float = 0.0) -> Density:
    return Density.of(mu * ONE, sigma * ONE, ONE)


def solved(codec: ALQ | AMQ, density: Density) -> torch.Tensor:
    return codec.solve(density, codec.levels().double())


# of the specification: positive levels, variance, variance of even levels and of powers of 1/2
OPTIMA = {
    (0.1, 3): ([0.038033, 0.122291, 0.250646, 1.0], 1.6756063e-3, 1.4342226e-2, 9.5693334e-3),
    (0.01, 3): ([0.004403, 0.014530, 0.034050, 1.0], 2.2499641e-5, 2.0308163e-2, 1.5525e-2),
    (0.1, 2): ([0.121114, 1.0], 1.6963313e-2, 1.01141e-1, 2.4e-1),
    (0.1, 4): (
        [0.015883, 0.048192, 0.082273, 0.119874, 0.164133, 0.222526, 0.324618, 1.0], 2.9155582e-4, 2.96299e-3, 8.2e-4,
    ),
}  # fmt: skip
MULTIPLIERS = {(0.1, 2): 0.121114, (0.1, 3): 0.360294, (0.1, 4): 0.592155, (0.01, 2): 0.0205037, (0.01, 3): 0.1493547}


@pytest.mark.parametrize("case", OPTIMA)
def test_optimum(case: tuple[float, int]) -> None:
    density, bits, (positive, least, even, powers) = normal_density(case[0]), case[1], OPTIMA[case]
    levels = solved(ALQ(bits=bits), density)
    torch.testing.assert_close(levels[levels > 0], torch.tensor(positive).double(), rtol=0, atol=1e-6)
    assert float(expected_variance(density, levels)) == pytest.approx(least, rel=1e-6)
    assert float(expected_variance(density, torch.linspace(-1, 1, 1 << bits))) == pytest.approx(even, rel=1e-5)
    halves = with_mirror(power_grid(0.5 * ONE, 1 << (bits - 1), True)[0], "signed")
    assert float(expected_variance(density, halves)) == pytest.approx(powers, rel=1e-4)


def test_multiplier() -> None:
    for (sigma, bits), p in MULTIPLIERS.items():
        levels = solved(AMQ(bits=bits), normal_density(sigma))
        assert float(levels[-2]) == pytest.approx(p, abs=1e-6)


@pytest.mark.parametrize("layout", ["signed", "magnitude"])
def test_stationary_and_symmetric(layout: str) -> None:
    codec = ALQ(bits=4, layout=layout)
    levels = solved(codec, MIXED)
    assert levels.numel() == 16 - (layout == "magnitude")
    assert bool((levels.diff() > 0).all())
    assert (float(levels[0]), float(levels[-1])) == (-1.0, 1.0)
    assert torch.equal(levels, -levels.flip(0))
    half, magnitudes = MIXED.folded(), codec.magnitudes(levels)
    assert float(gradient(half, magnitudes, codec.central).abs().max()) < 1e-9
    best = float(expected_variance(half, magnitudes, codec.central))
    for j in range(0 if codec.central else 1, magnitudes.numel() - 1):
        for shift in (-1e-3, 1e-3):
            moved = magnitudes.clone()
            moved[j] += shift
            assert float(expected_variance(half, moved, codec.central)) >= best


def test_levels_that_need_not_mirror() -> None:
    density = normal_density(0.05, mu=0.2)
    free = solved(ALQ(bits=3, symmetric=False), density)
    assert float(gradient(density, free).abs().max()) < 1e-9
    assert float(expected_variance(density, free)) < float(expected_variance(density, solved(ALQ(bits=3), density)))
    symmetric = solved(ALQ(bits=3, symmetric=False), normal_density(0.1))
    torch.testing.assert_close(symmetric, -symmetric.flip(0), rtol=0, atol=1e-7)


@pytest.mark.parametrize("central", [False, True])
def test_sweeps_never_raise_the_variance(central: bool) -> None:
    half = MIXED.folded()
    grid = torch.linspace(0, 1, 9, dtype=torch.float64)[int(central) :]
    for alternate in (True, False):
        values = [float(expected_variance(half, grid, central))]
        for _ in range(10):
            grid = coordinate_descent(half, grid, central, sweeps=1, alternate=alternate)
            values.append(float(expected_variance(half, grid, central)))
        assert all(b <= a + 1e-15 for a, b in pairwise(values))


def test_closed_forms_agree_with_quadrature() -> None:
    for a, b in ((-1.0, -0.3), (-0.31, -0.29), (0.0, 0.05), (0.4, 1.0)):
        ends = torch.tensor([a, b], dtype=torch.float64)
        r = torch.linspace(a, b, 20_001, dtype=torch.float64)
        weights = {"mass": torch.ones_like(r), "above": r - a, "below": b - r, "rounding_variance": (r - a) * (b - r)}
        for name, weight in weights.items():
            want = integrate.simpson((weight * MIXED.pdf(r)).numpy(), x=r.numpy())
            assert float(getattr(MIXED, name)(*ends)) == pytest.approx(want, rel=1e-6, abs=1e-11), name
    half, b = MIXED.folded(), 0.12 * ONE
    want = integrate.quad(lambda r: (0.12**2 - r * r) * float(half.pdf(torch.tensor(r).double())), 0, 0.12)[0]
    assert float(half.central_variance(b)) == pytest.approx(want, rel=1e-7)


def test_derivative_of_the_multiplier() -> None:
    half, step = MIXED.folded(), 1e-5
    for central in (True, False):
        for p in (0.1, 0.4, 0.8):
            ends = [expected_variance(half, power_grid((p + s) * ONE, 4, central), central) for s in (-step, step)]
            slope = float(multiplier_gradient(half, p * ONE, 4, central))
            assert slope == pytest.approx(float(ends[1] - ends[0]) / (2 * step), rel=1e-4, abs=1e-8)


def test_expected_variance_is_the_variance_found() -> None:
    sigma, count = 0.1, 200_000
    r = torch.randn(count, generator=torch.Generator().manual_seed(0)).mul(sigma)
    r = r[r.abs() < 1][: count - 1]
    x = torch.cat([r, torch.ones(1)])  # its largest magnitude is 1, so r is what is rounded
    codec = ALQ(bits=3, bucket=x.numel(), norm="linf")
    state = {"levels": separate(solved(codec, normal_density(sigma)))}
    error = codec.decode(codec.encode(x, NoiseKey.of(1), state)) - x
    want = OPTIMA[sigma, 3][1]
    assert float(error.double().square().mean()) == pytest.approx(want, rel=0.03)


def symbol_probabilities(density: Density, levels: torch.Tensor) -> torch.Tensor:
    gaps = levels.diff()
    up, down = density.above(levels[:-1], levels[1:]) / gaps, density.below(levels[:-1], levels[1:]) / gaps
    return torch.cat([down, 0 * ONE]) + torch.cat([0 * ONE, up])


ENTROPIES = {0.1: (2.2934, 2.3795), 0.01: (2.1066, 2.2486)}


@pytest.mark.parametrize("sigma", ENTROPIES)
def test_entropy_of_the_symbols(sigma: float) -> None:
    density, (entropy, coded) = normal_density(sigma), ENTROPIES[sigma]
    levels = solved(ALQ(bits=3), density)
    p = symbol_probabilities(density, levels)
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    assert float(p @ levels) == pytest.approx(0, abs=1e-12)
    assert float(-(p * p.log2()).sum()) == pytest.approx(entropy, abs=1e-4)
    lengths = torch.from_numpy(code_lengths((p * 1e9).round().long().numpy())).double()
    assert float(p @ lengths) == pytest.approx(coded, abs=1e-4)
    codec = Huffman(codec=ALQ(bits=3, bucket=1 << 20, norm="linf"))
    x = torch.randn(1 << 18, generator=torch.Generator().manual_seed(1)).mul(sigma).clamp(-1, 1)
    x[0] = 1.0
    payload = codec.encode(x, NoiseKey.of(2), {"levels": separate(levels)})
    assert coded - 0.02 < payload.bits_per_element < coded + 0.02


def test_entropy_coding_never_makes_it_longer() -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    even = QSGD(bits=2, layout="signed", norm="linf", bucket=5000)
    uniform = torch.rand(5000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for codec, values in ((even, uniform), (QSGD(bits=8), x), (QSGD(bits=3), x[:5]), (QSGD(), x[:0])):
        fixed = codec.encode(values, NoiseKey.of(1))
        for wrapper in (Huffman(codec=codec), Zstd(codec=codec)):
            coded = wrapper.encode(values, NoiseKey.of(1))
            assert coded.nbytes <= fixed.nbytes
            assert torch.equal(plain(coded).parts["codes"], fixed.parts["codes"])
            assert ("codes" in coded.parts) is (coded.nbytes == fixed.nbytes)


def bound(levels: torch.Tensor, size: int) -> float:
    """Return eps_Q of the magnitude layout in the 2-norm."""
    magnitudes = levels[levels > 0].double()
    rho, least = float((magnitudes[1:] / magnitudes[:-1]).max()), float(magnitudes[0])
    tail = min(
        (1 / (2 - p)) * ((1 - p) / (2 - p)) ** (1 - p) * least ** (2 - p) * size ** ((2 - p) / 2)
        for p in torch.linspace(0.001, 0.999, 999).tolist()
    )
    return (rho - 1) ** 2 / (4 * rho) + tail


def test_error_of_one_bucket_within_the_bound() -> None:
    codec, size = AMQ(bits=4, layout="magnitude", bucket=512), 512
    eps = bound(codec.levels(), size)
    flat = torch.full((size,), 1 / math.sqrt(size))
    heavy = torch.from_numpy(scipy_stats.t.rvs(1.5, size=size, random_state=1)).float()
    for x in (flat, heavy, torch.randn(size, generator=torch.Generator().manual_seed(1))):
        errors = [codec.decode(codec.encode(x, NoiseKey.of(i))) - x for i in range(50)]
        mean = float(torch.stack(errors).double().square().sum(1).mean())
        assert mean <= 1.05 * eps * float(x.double().square().sum())


def test_values_on_levels_are_exact() -> None:
    codec = ALQ(bits=3, bucket=64, norm="linf")
    levels = codec.levels()
    x = levels[torch.randint(0, 8, (640,), generator=torch.Generator().manual_seed(0))] * 0.37
    x[::64] = 0.37
    payload: Payload = codec.encode(x, NoiseKey.of(1))
    assert torch.equal(codec.decode(payload), x)
