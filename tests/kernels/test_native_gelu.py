"""GELU by the native library: the curves' own bits, and PyTorch's values up to rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gradbits.kernels.gelu import CURVES
from gradbits.kernels.native.gelu import gelu

SPECIAL = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e30, -1e30, 1e-38, 5.5, -5.5, 5.25])


def values(count: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 3
    x[: len(SPECIAL)] = SPECIAL[:count]
    return x.to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@settings(max_examples=40, deadline=None)
@given(
    count=st.sampled_from([1, 2, 15, 64, 65, 1000, 40_000]),
    approximate=st.sampled_from(["none", "tanh"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    back=st.booleans(),
    seed=st.integers(0, 99),
)
def test_bits_are_those_of_the_curve(native_level, count, approximate, dtype, back, seed):
    x, g = values(count, seed, dtype), values(count, seed + 100, dtype)
    got, widest = gelu(x, approximate, g if back else None)
    share = CURVES[approximate][back].share(x.float())
    want = ((g if back else x).float() * share).to(dtype)
    assert same(got, want)
    assert same(widest, want.float().abs().max())


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_values_and_gradients_are_pytorchs(native_level, approximate):
    x = torch.linspace(-9, 9, 300_001)
    exact = x.double().requires_grad_()
    y = F.gelu(exact, approximate=approximate)
    (slope,) = torch.autograd.grad(y.sum(), exact)
    got, _ = gelu(x, approximate)
    got_slope, _ = gelu(x, approximate, torch.ones_like(x))
    assert (got - y).abs().max() < 2e-6
    assert (got_slope - slope).abs().max() < 1e-6


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads_and_order_in_memory(native_level, threads):
    """Beyond the caches, where results go past them."""
    x = values(3 * 700 * 1100, 0).view(3, 700, 1100).permute(2, 0, 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        y, _ = gelu(x, "none")
    finally:
        torch.set_num_threads(before)
    assert y.stride() == x.stride()
    assert same(y, x * CURVES["none"][0].share(x))
