"""Native packing equals the reference byte for byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradbits.core.errors import ArgumentError
from gradbits.core.packing import pack_codes, packed_width, unpack_codes
from gradbits.kernels.native.packing import pack, unpack


def codes_of(count, bits, seed):
    """Every legal code."""
    half = 1 << (packed_width(bits) - 1)
    return torch.randint(-half, half, (count,), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 600), bits=st.integers(2, 8), gaps=st.booleans(), seed=st.integers(0, 99))
def test_equals_the_reference(native_level, count, bits, gaps, seed):
    """Any count and width, codes with gaps in memory, and part of the codes back."""
    codes = codes_of(2 * count, bits, seed)[::2] if gaps else codes_of(count, bits, seed)
    packed = pack(codes, bits)
    assert torch.equal(packed, pack_codes(codes, bits))
    some = count - seed % (count + 1)
    assert torch.equal(unpack(packed, bits, some), codes[:some])


@pytest.mark.parametrize("bits", [2, 4])
def test_several_threads(native_level, bits):
    """Several tasks, the last one short."""
    codes = codes_of(400_003, bits, 0)
    packed = pack(codes, bits)
    assert torch.equal(packed, pack_codes(codes, bits))
    assert torch.equal(unpack(packed, bits, 400_003), unpack_codes(packed, bits, 400_003))


def test_too_few_bytes_are_refused(native_level):
    """As in the reference."""
    with pytest.raises(ArgumentError, match="not 9"):
        unpack(torch.zeros(4, dtype=torch.uint8), 4, 9)
