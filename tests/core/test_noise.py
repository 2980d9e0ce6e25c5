"""The one noise function: reproducible from any start, uniform, uncorrelated.

False alarms: the statistics run on fixed seeds, so a pass today is a pass tomorrow. Each threshold is the one that an
honest generator would exceed with probability 1e-6 on a fresh seed.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gradbits.core.noise import NoiseKey, draw_seed, noise_bits, uniform_noise

ALARM = 1e-6
COUNT = 1 << 18
SEEDS = (0, 1, 2, 12345, (1 << 62) + 7, -1)


def slow_bits(key: NoiseKey, index: int) -> int:
    """Element ``index`` of a stream with Python integers."""
    mask = 0xFFFFFFFF
    h = (index // 2 + key.k0) & mask
    h ^= h >> 16
    h = h * 0x7FEB352D & mask
    h ^= h >> 15
    h = (h + key.k1) & mask
    h = h * 0x846CA68B & mask
    h ^= h >> 16
    half = h & 0xFFFF if index % 2 == 0 else h >> 16
    return half - (1 << 16) if half >= 1 << 15 else half


@settings(max_examples=100, deadline=None)
@given(st.integers(-(2**70), 2**70), st.integers(-5, 2**40), st.integers(0, 2**33), st.integers(0, 40))
def test_bits_from_any_start(seed, stream, start, count):
    key = NoiseKey.of(seed, stream)
    bits = noise_bits(key, start, count)
    assert bits.dtype == torch.int16
    assert bits.tolist() == [slow_bits(key, start + i) for i in range(count)]


def test_scratch_changes_nothing():
    key = NoiseKey.of(3)
    scratch = torch.full((2, 60), -1, dtype=torch.int32)
    assert torch.equal(noise_bits(key, 5, 100, scratch=scratch).clone(), noise_bits(key, 5, 100))


def test_threads_change_nothing():
    key, threads = NoiseKey.of(9), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = noise_bits(key, 1, COUNT).clone()
        torch.set_num_threads(2)
        assert torch.equal(noise_bits(key, 1, COUNT), alone)
    finally:
        torch.set_num_threads(threads)


def test_noise_is_inside_the_half_step():
    v = uniform_noise(NoiseKey.of(1), COUNT)
    assert v.dtype == torch.float32
    assert -0.5 < float(v.min()) < -0.4999
    assert 0.4999 < float(v.max()) < 0.5
    assert torch.equal(v * 2**17, torch.round(v * 2**17))  # (k + 1/2) / 2^16 is exact


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("shift", "bins"), [(8, 256), (0, 256)])
def test_uniform_in_high_and_low_bits(seed, shift, bins):
    k = noise_bits(NoiseKey.of(seed), 0, COUNT).to(torch.int64) & 0xFFFF
    counts = torch.bincount((k >> shift) % bins, minlength=bins)
    assert stats.chisquare(counts.numpy()).pvalue > ALARM


@pytest.mark.parametrize("seed", SEEDS[:3])
def test_all_values_occur_evenly(seed):
    counts = torch.bincount(noise_bits(NoiseKey.of(seed), 0, 1 << 21).to(torch.int64) & 0xFFFF, minlength=1 << 16)
    p = stats.chisquare(counts.numpy()).pvalue
    assert ALARM < p < 1 - ALARM  # too even would be as wrong as too uneven


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """The z-score of the correlation of two uniform samples."""
    return float((a.double() * b.double()).sum()) / (math.sqrt(a.numel()) / 12)


Z = float(stats.norm.isf(ALARM / 2))


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 64, 1000])
def test_neighbours_are_uncorrelated(lag):
    v = uniform_noise(NoiseKey.of(4), COUNT)
    assert abs(correlation(v[lag:], v[:-lag])) < Z


@pytest.mark.parametrize(
    ("a", "b"), [((0, 0), (0, 1)), ((0, 0), (1, 0)), ((5, 2), (5, 4)), ((7, 1), (8, 0)), ((1, 2), (2, 1))]
)
def test_streams_and_seeds_are_uncorrelated(a, b):
    x, y = (uniform_noise(NoiseKey.of(*k), COUNT) for k in (a, b))
    assert abs(correlation(x, y)) < Z
    assert abs(correlation(x[1:], y[:-1])) < Z
    # also in the bits: neither equal nor complementary more often than chance
    same = (noise_bits(NoiseKey.of(*a), 0, COUNT) ^ noise_bits(NoiseKey.of(*b), 0, COUNT)).to(torch.int64) & 0xFFFF
    for bit in range(16):
        ones = int(((same >> bit) & 1).sum())
        assert abs(ones - COUNT / 2) / math.sqrt(COUNT / 4) < Z, bit


def test_many_streams_give_independent_first_elements():
    first = torch.tensor([int(noise_bits(NoiseKey.of(s), 0, 1)) & 0xFFFF for s in range(4096)])
    assert stats.chisquare(torch.bincount(first >> 11, minlength=32).numpy()).pvalue > ALARM


def test_keys_differ():
    keys = {NoiseKey.of(seed, stream) for seed in range(64) for stream in range(8)}
    assert len(keys) == 64 * 8


def test_seed_follows_the_generator():
    torch.manual_seed(5)
    a = [draw_seed() for _ in range(3)]
    state = torch.get_rng_state()
    after = draw_seed()
    torch.set_rng_state(state)
    assert draw_seed() == after
    torch.manual_seed(5)
    assert [draw_seed() for _ in range(3)] == a
    assert len({*a, after}) == 4
    assert all(0 <= s < 1 << 63 for s in a)
