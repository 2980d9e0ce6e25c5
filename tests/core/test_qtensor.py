"""QTensor: codes and scales give the values back, packed or not, for every grain and grid."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradbits.core.errors import ArgumentError
from gradbits.core.grain import Grain, PerBlock, PerChannel, PerRow, PerTensor
from gradbits.core.qtensor import QTensor

BITS = st.integers(2, 8)


@st.composite
def tensors(draw) -> QTensor:
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    bits, rng = draw(BITS), torch.Generator().manual_seed(draw(st.integers(0, 999)))
    grains: list[Grain] = [PerTensor(), PerBlock(size=4)]
    if shape:
        grains += [PerRow(), PerChannel(axis=-1)]
    grain = draw(st.sampled_from(grains))
    half, size = 1 << (bits - 1), grain.scale_shape(shape)
    zero = draw(st.sampled_from(["none", "zero_point", "offset"]))
    return QTensor(
        codes=torch.randint(-half, half, shape, generator=rng).to(torch.int8),
        scale=torch.rand(size, generator=rng) + 0.1,
        bits=bits,
        shape=torch.Size(shape),
        grain=grain,
        dtype=draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])),
        zero_point=torch.randint(-half, half, size, generator=rng).float() if zero == "zero_point" else None,
        offset=torch.randn(size, generator=rng) if zero == "offset" else None,
    )


@settings(max_examples=150, deadline=None)
@given(tensors())
def test_values_are_those_of_the_formula(q):
    def spread(value: torch.Tensor | None) -> torch.Tensor:
        return torch.zeros(()) if value is None else q.grain.expand(value, q.shape)

    want = spread(q.scale) * (q.codes.float() - spread(q.zero_point)) + spread(q.offset)
    got = q.dequantize()
    assert got.dtype == q.dtype
    assert torch.equal(got, want.to(q.dtype).reshape(q.shape))
    assert q.dequantize(torch.float64).dtype == torch.float64


@settings(max_examples=150, deadline=None)
@given(tensors())
def test_packing_changes_the_bytes_only(q):
    packed = q.pack()
    assert packed.is_packed
    assert not q.is_packed
    width = 2 if q.bits == 2 else 4 if q.bits <= 4 else 8
    assert packed.codes.numel() == -(-q.codes.numel() * width // 8)
    assert q.nbytes - packed.nbytes == q.codes.numel() - packed.codes.numel()
    assert torch.equal(packed.unpack().codes, q.codes)
    assert torch.equal(packed.dequantize(), q.dequantize())
    assert packed.pack() is packed
    assert q.unpack() is q


@settings(max_examples=100, deadline=None)
@given(tensors())
def test_the_value_of_code_zero(q):
    value = q.zero_value()
    zeros = QTensor(**{**vars(q), "codes": torch.zeros_like(q.codes), "dtype": torch.float32})
    want = torch.zeros(()) if value is None else q.grain.expand(value, q.shape)
    assert torch.allclose(zeros.dequantize(), want.expand(q.shape), rtol=1e-6)


def test_dequantizing_does_not_touch_the_codes():
    codes = torch.tensor([1, -2], dtype=torch.int8)
    q = QTensor(codes=codes, scale=torch.tensor([0.5]), bits=8, shape=codes.shape)
    q.dequantize()
    assert codes.tolist() == [1, -2]


def test_a_grid_has_a_zero_point_or_an_offset():
    one = torch.ones(1)
    with pytest.raises(ArgumentError, match="zero_point, offset"):
        QTensor(codes=one.to(torch.int8), scale=one, bits=4, shape=one.shape, zero_point=one, offset=one)
