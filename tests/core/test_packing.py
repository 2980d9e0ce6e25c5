"""Packed codes come back as they were, whatever their number and shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradbits.core.errors import ArgumentError, DtypeError, GradbitsError
from gradbits.core.packing import pack_codes, packed_width, unpack_codes

SHAPES = st.lists(st.integers(0, 6), min_size=0, max_size=3).map(tuple)


def slow_pack(values: list[int], width: int) -> list[int]:
    """The layout written out: lower index in lower bits, the last byte filled with zeros."""
    whole = sum((v & ((1 << width) - 1)) << (i * width) for i, v in enumerate(values))
    return list(whole.to_bytes(-(-len(values) * width // 8), "little"))


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 8), SHAPES, st.integers(0, 2**31))
def test_round_trip_and_layout(bits, shape, seed):
    width = packed_width(bits)
    low, high = -(1 << (width - 1)), (1 << (width - 1)) - 1
    codes = torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == slow_pack(codes.flatten().tolist(), width)
    assert torch.equal(unpack_codes(packed, bits, codes.numel()).view(shape), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_code_of_a_width(bits):
    codes = torch.arange(-(1 << (bits - 1)), 1 << (bits - 1)).to(torch.int8)
    assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, codes.numel()), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_memory_order_does_not_matter(bits):
    codes = torch.randint(-2, 2, (6, 5), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    for view in (codes.t(), codes[::2], codes[:, 1:4], codes[:1].expand(3, 5)):
        assert torch.equal(pack_codes(view, bits), pack_codes(view.contiguous(), bits))


def test_packing_does_not_share_memory():
    codes = torch.ones(3, dtype=torch.int8)
    packed = pack_codes(codes, 8)
    packed.zero_()
    assert codes.tolist() == [1, 1, 1]


@pytest.mark.parametrize("bits", [0, 9, True, 4.0, "4", None])
def test_illegal_bits(bits):
    codes = torch.zeros(2, dtype=torch.int8)
    with pytest.raises(GradbitsError, match="bits="):
        pack_codes(codes, bits)
    with pytest.raises(GradbitsError, match="bits="):
        unpack_codes(codes.view(torch.uint8), bits, 1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32, torch.bool])
def test_codes_are_int8(dtype):
    with pytest.raises(DtypeError, match=str(dtype)):
        pack_codes(torch.zeros(2, dtype=dtype), 4)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float32])
def test_packed_bytes_are_uint8(dtype):
    with pytest.raises(DtypeError, match=str(dtype)):
        unpack_codes(torch.zeros(2, dtype=dtype), 4, 2)


@pytest.mark.parametrize(("bits", "count"), [(2, 9), (4, 5), (8, 3), (4, -1), (4, True)])
def test_illegal_counts(bits, count):
    with pytest.raises((ArgumentError, DtypeError)):
        unpack_codes(torch.zeros(2, dtype=torch.uint8), bits, count)
