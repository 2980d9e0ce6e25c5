"""The digest of memory: native as in torch, and different for whatever is different."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradbits.kernels import coding
from gradbits.kernels.native import digest as native


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.sampled_from([0, 1, 3, 17, 64, 130]), max_size=3).filter(lambda s: math.prod(s) < 300_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int8]),
    turned=st.booleans(),
    seed=st.integers(0, 100),
)
def test_native_equals_the_reference(native_level, shape, dtype, turned, seed):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 50).to(dtype)
    x = x.transpose(0, -1) if turned and x.dim() > 1 else x
    assert torch.equal(native.digest(x), coding.digest(x))


@pytest.mark.parametrize("count", [70_000, 65_536, 131_073])
def test_native_equals_the_reference_over_several_pieces(native_level, count):
    x = torch.randn(count, generator=torch.Generator().manual_seed(0))
    assert torch.equal(native.digest(x), coding.digest(x))


def test_a_change_shows(native_level):
    """One value, two that trade places, the same values in another order of blocks, another length."""
    x = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    seen = {native.digest(x).item(), native.digest(x[:-1]).item(), native.digest(x.flip(0)).item()}
    for i, j in ((0, 128), (5, 6), (100, 70_000), (65_536, 131_072)):
        y = x.clone()
        y[i], y[j] = x[j], x[i]
        seen.add(native.digest(y).item())
    seen.add(native.digest(torch.cat([x[65_536:131_072], x[:65_536], x[131_072:]])).item())
    y = x.clone()
    y[77] = torch.nextafter(x[77], torch.tensor(9.0))
    seen.add(native.digest(y).item())
    assert len(seen) == 9
