"""Native kernels of the wire equal the torch reference bit for bit, on every instruction set and number of threads."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradbits.core import packing
from gradbits.core.errors import ArgumentError, CorruptDataError, DtypeError
from gradbits.core.noise import NoiseKey
from gradbits.kernels import buckets as reference
from gradbits.kernels.native import buckets as native

COUNTS = st.one_of(st.integers(0, 70), st.integers(0, 5000))
BUCKETS = st.one_of(st.integers(1, 70), st.sampled_from([100, 128, 512, 1000, 4096, 8192]))
ORDERS = (2.0, math.inf)
EXACT = {"rtol": 0, "atol": 0, "equal_nan": True}


def values(count, seed):
    """Values of very different sizes, with buckets of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator)
    x *= 10.0 ** torch.randint(-3, 3, (count,), generator=generator)
    x[: count // 4] *= torch.rand(count // 4, generator=generator) < 0.02
    return x


def levels_of(kind, count, seed):
    """Levels from -1 to 1: equally spaced, nearly so, or anyhow."""
    if kind == "uniform":
        return (torch.arange(count, dtype=torch.float64) * 2 / (count - 1) - 1).float()
    generator = torch.Generator().manual_seed(seed)
    inner = torch.rand(count, generator=generator, dtype=torch.float64)
    if kind == "powers":
        inner = 2.0 ** -(10 * inner)
        inner *= torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    else:
        inner = 2 * inner - 1
    found = torch.cat([torch.tensor([-1.0, 1.0]), inner[2:].float()]).sort().values
    return found if bool((found.diff() > 2.0**-126).all()) else levels_of("uniform", count, seed)


@settings(max_examples=50, deadline=None)
@given(count=COUNTS, bits=st.integers(1, 8), gaps=st.booleans(), seed=st.integers(0, 99))
def test_packing(native_level, count, bits, gaps, seed):
    """Any count and width, symbols with gaps in memory, and part of the symbols back."""
    generator = torch.Generator().manual_seed(seed)
    symbols = torch.randint(0, 1 << bits, (2 * count,), dtype=torch.uint8, generator=generator)
    symbols = symbols[::2] if gaps else symbols[:count]
    packed = native.pack_symbols(symbols, bits)
    assert torch.equal(packed, packing.pack_symbols(symbols, bits))
    some = count - seed % (count + 1)
    assert torch.equal(native.unpack_symbols(packed, bits, some), symbols[:some])


@settings(max_examples=50, deadline=None)
@given(
    count=st.one_of(COUNTS, st.sampled_from([65_535, 65_536, 65_537, 66_000])),
    bucket=st.one_of(BUCKETS, st.just(1 << 20)),
    bad=st.sampled_from([0.0, 1e-30, 1e-38, 1e-44, 3e38, math.inf, -math.inf, math.nan]),
    order=st.sampled_from(ORDERS),
    seed=st.integers(0, 99),
)
def test_norms(native_level, count, bucket, bad, order, seed):
    """Both orders; tiny, huge and non-finite values; sums of one, two and three levels."""
    x = values(count, seed)
    if count:
        x[seed % count] = bad
    if bad != 0 and abs(bad) < 1e-20:
        x *= bad
    want, got = reference.bucket_norms(x, bucket, order), native.bucket_norms(x, bucket, order)
    torch.testing.assert_close(got, want, **EXACT)
    assert bool(got.isfinite().all()) == bool(x.isfinite().all())


def check(x, bucket, bits, levels, noise, order):
    """Norms, codes, values and sums are the same."""
    norms = reference.bucket_norms(x, bucket, order)
    want = reference.encode_buckets(x, norms, levels, bucket, bits, noise)
    assert torch.equal(native.encode_buckets(x, norms, levels, bucket, bits, noise), want)
    found = torch.empty_like(norms)
    assert torch.equal(native.encode_buckets(x, found, levels, bucket, bits, noise, order), want)
    assert torch.equal(found, norms)
    back = reference.decode_buckets(want, norms, levels, bucket, bits, x.numel())
    assert torch.equal(native.decode_buckets(want, norms, levels, bucket, bits, x.numel()), back)
    total, sums = x.flip(0).clone(), x.flip(0).clone()
    reference.decode_buckets(want, norms, levels, bucket, bits, x.numel(), total)
    assert native.decode_buckets(want, norms, levels, bucket, bits, x.numel(), sums) is sums
    assert torch.equal(sums, total)


@settings(max_examples=100, deadline=None)
@given(
    count=COUNTS,
    bucket=BUCKETS,
    bits=st.integers(1, 8),
    missing=st.integers(0, 3),
    kind=st.sampled_from(["uniform", "powers", "anyhow"]),
    explicit=st.booleans(),
    order=st.sampled_from(ORDERS),
    on_levels=st.booleans(),
    seed=st.integers(0, 999),
)
def test_encode_and_decode(native_level, count, bucket, bits, missing, kind, explicit, order, on_levels, seed):
    """Counts, buckets, widths, numbers and kinds of levels, both kinds of noise, values that lie on levels."""
    number = max(2, (1 << bits) - missing)
    levels = levels_of(kind, number, seed)
    x = values(count, seed)
    if on_levels and count:
        generator = torch.Generator().manual_seed(seed)
        x = levels[torch.randint(0, number, (count,), generator=generator)] * 0.75
    noise = NoiseKey.of(seed, 2)
    if explicit:
        noise = torch.rand(count, generator=torch.Generator().manual_seed(seed + 1)) - 0.5
    check(x, bucket, bits, levels, noise, order)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("bits", "number"), [(4, 15), (3, 8), (8, 256)])
@pytest.mark.parametrize("bucket", [512, 8191, 140_000])
def test_threads_do_not_matter(native_level, threads, bits, number, bucket):
    """Several tasks, the last one short; norms within the call and before it."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check(values(150_013, 7), bucket, bits, levels_of("uniform", number, 0), NoiseKey.of(3), math.inf)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("bucket", [48, 50])
def test_symbols_without_a_level(native_level, bits, bucket):
    """Wherever they are."""
    number = max(2, (1 << bits) - 1)
    levels, norms = levels_of("uniform", number, 0), torch.ones(40)
    for at in (0, 17, 500, 998):
        symbols = torch.zeros(999, dtype=torch.uint8)
        symbols[at] = (1 << bits) - 1
        packed = packing.pack_symbols(symbols, bits)
        for decode in (native.decode_buckets, reference.decode_buckets):
            if bits == 1:
                assert decode(packed, norms, levels, bucket, bits, 999)[at] == 1
                continue
            with pytest.raises(CorruptDataError, match=f"there are {number} levels"):
                decode(packed, norms, levels, bucket, bits, 999)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38, 1e-45])
@pytest.mark.parametrize("number", [8, 15, 100])
def test_extremes_do_not_crash(native_level, bad, number):
    """Symbols of values that are not finite mean nothing, but they are symbols."""
    x, levels = torch.full((100,), bad), levels_of("anyhow", number, 1)
    bits = (number - 1).bit_length()
    for norms in (torch.full((2,), abs(bad)), torch.ones(2), torch.zeros(2)):
        packed = native.encode_buckets(x, norms, levels, 50, bits, NoiseKey.of(1))
        assert int(packing.unpack_symbols(packed, bits, 100).max()) < number
        if math.isfinite(bad):
            assert torch.equal(packed, reference.encode_buckets(x, norms, levels, 50, bits, NoiseKey.of(1)))


def test_too_little_data_is_refused(native_level):
    """A kernel never reads beyond its arguments."""
    levels, few = torch.tensor([-1.0, 1.0]), torch.zeros(1, dtype=torch.uint8)
    for norms, count in ((torch.ones(2), 9), (torch.ones(1), 8)):
        with pytest.raises(ArgumentError, match="too few"):
            native.decode_buckets(few, norms, levels, 4, 1, count)
    with pytest.raises(ArgumentError, match="fewer than 9"):
        native.unpack_symbols(few, 1, 9)
    with pytest.raises(ArgumentError, match="bits"):
        native.unpack_symbols(few, 9, 1)
    with pytest.raises(DtypeError):
        native.pack_symbols(torch.zeros(1), 4)
