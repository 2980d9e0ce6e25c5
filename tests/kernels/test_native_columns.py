"""Sums of columns: one order of additions for every backend and any number of threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradbits.kernels import columns as reference
from gradbits.kernels.native import columns as native


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 2, 8, 63, 64, 65, 127, 129, 4096, 4100]),
    width=st.sampled_from([1, 3, 16, 64, 65, 130]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    odd=st.sampled_from([0.0, float("nan"), float("inf"), float("-inf")]),
    seed=st.integers(0, 99),
)
def test_native_sums_equal_the_reference(native_level, rows, width, dtype, odd, seed):
    x = (torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)
    if rows and odd:
        x[rows // 2, width // 2] = odd
    got, want = torch.empty(()), torch.empty(())
    a, b = native.column_sums(x, got), reference.column_sums(x, want)
    assert a.dtype == b.dtype == torch.float32
    assert torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))
    assert torch.equal(got.nan_to_num(9.0), want.nan_to_num(9.0))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(native_level, threads):
    x = torch.randn(5000, 300)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(native.column_sums(x), reference.column_sums(x))
    finally:
        torch.set_num_threads(before)


def test_sums_are_close_to_exact_ones():
    x = torch.randn(100_000, 3) + 10.0
    exact = x.double().sum(0)
    assert ((reference.column_sums(x) - exact).abs() < 2e-6 * exact).all()


def test_one_row_is_a_copy(native_level):
    x = torch.ones(1, 4)
    for column_sums in (reference.column_sums, native.column_sums):
        sums = column_sums(x)
        sums += 1.0
        assert x.sum() == 4.0
