"""Native Huffman coding equals the reference byte for byte and refuses the same streams, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradbits.core.errors import ArgumentError, CorruptDataError
from gradbits.kernels import huffman_symbols as reference
from gradbits.kernels.huffman import check_lengths, code_lengths
from gradbits.kernels.native import huffman as native

ALPHABETS = st.sampled_from([1, 2, 3, 7, 8, 9, 16, 17, 63, 64, 65, 200, 256])


def drawn(count, alphabet, skew, seed):
    """Symbols of which the first are the more frequent, the more so the larger ``skew``."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.exp(-skew * torch.arange(alphabet, dtype=torch.float64))
    if not count:
        return torch.zeros(0, dtype=torch.uint8)
    return torch.multinomial(weights, count, replacement=True, generator=generator).to(torch.uint8)


def check(symbols, alphabet, chunk, limit):
    """Same counts, same bytes, and back."""
    counts = reference._count_symbols(symbols, alphabet)
    assert torch.equal(native.count_symbols(symbols, alphabet), counts)
    lengths = torch.from_numpy(code_lengths(counts.numpy(), limit=limit))
    want = reference._encode(symbols, lengths, chunk, b"head")
    got = native.huffman_encode(symbols, lengths, chunk, b"head")
    assert torch.equal(got, want)
    assert torch.equal(native.huffman_decode(got[4:], lengths, chunk, symbols.numel()), symbols)


@settings(deadline=None, max_examples=80)
@given(
    count=st.integers(0, 5000),
    alphabet=ALPHABETS,
    skew=st.sampled_from([0.0, 0.05, 0.5, 3.0]),
    chunk=st.sampled_from([8, 32, 256, 1024, 8192]),
    limit=st.sampled_from([8, 11, 12, 15]),
    seed=st.integers(0, 999),
)
def test_equals_the_reference(native_level, count, alphabet, skew, chunk, limit, seed):
    """Sizes, alphabets, chunks and longest codes."""
    check(drawn(count, alphabet, skew, seed), alphabet, chunk, limit)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("alphabet", [2, 8, 16, 100])
def test_threads_do_not_matter(native_level, threads, alphabet):
    """Several tasks of each kernel, the last ones short."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check(drawn(600_011, alphabet, 0.7, 5), alphabet, 1024, 15)
    finally:
        torch.set_num_threads(before)


def test_symbols_with_gaps_in_memory(native_level):
    """Every other byte of a tensor."""
    check(drawn(4000, 8, 0.5, 2)[::2], 8, 64, 11)


def test_symbols_without_a_code_are_named(native_level):
    """Whichever group of a look-up they are in, and in the last short group."""
    lengths = torch.tensor([1, 2, 0, 2], dtype=torch.uint8)
    for count in (1, 2, 5, 64, 4001):
        for bad, message in ((2, "2 has no code"), (4, "alphabet has 4"), (200, "alphabet has 4")):
            for at in {0, count // 2, count - 1}:
                symbols = torch.zeros(count, dtype=torch.uint8)
                symbols[at] = bad
                with pytest.raises(ArgumentError, match=message):
                    native.huffman_encode(symbols, lengths, 1024, b"head")
                if bad >= 4:
                    with pytest.raises(ArgumentError, match=f"one is {bad}"):
                        native.count_symbols(symbols, 4)


CODES = st.sampled_from([[1], [1, 1], [1, 2, 2], [2, 2, 2, 2], [1, 2, 3, 4, 5, 6, 7, 7], [4] * 16, [8] * 256])


@settings(deadline=None, max_examples=150)
@given(
    lengths=CODES,
    deep=st.booleans(),
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=20),
    chunk=st.sampled_from([8, 64, 1024]),
    short=st.integers(0, 1023),
    zeros=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_bytes_as_in_the_reference(native_level, lengths, deep, sizes, chunk, short, zeros, seed):
    """Streams that nobody encoded: both refuse them, or both return the same symbols."""
    lengths = [*range(1, 15), 15, 15] if deep else lengths
    table = torch.from_numpy(check_lengths(lengths))
    generator = torch.Generator().manual_seed(seed)
    payload = torch.randint(0, 1 if zeros else 256, (sum(sizes),), dtype=torch.uint8, generator=generator)
    body = torch.cat([reference.join_sizes(torch.tensor(sizes), chunk), payload])
    count = max(1, len(sizes) * chunk - short % chunk)
    if count > 8 * payload.numel():
        return  # refused before a decoder is asked
    found = []
    for decode in (reference._decode, native.huffman_decode):
        try:
            found.append(decode(body, table, chunk, count).tolist())
        except CorruptDataError:
            found.append(None)
    assert found[0] == found[1]


@settings(deadline=None, max_examples=100)
@given(
    at=st.integers(0, 10**6),
    mask=st.integers(1, 255),
    count=st.integers(100, 3000),
    chunk=st.sampled_from([64, 512]),
)
def test_damaged_streams_as_in_the_reference(native_level, at, mask, count, chunk):
    """One damaged byte of a good stream, sizes included."""
    symbols = drawn(count, 8, 0.8, 3)
    lengths = torch.from_numpy(code_lengths(reference._count_symbols(symbols, 8).numpy()))
    body = reference._encode(symbols, lengths, chunk, b"head")[4:].clone()
    body[at % body.numel()] ^= mask
    found = []
    for decode in (reference._decode, native.huffman_decode):
        try:
            found.append(decode(body, lengths, chunk, count).tolist())
        except CorruptDataError:
            found.append(None)
    assert found[0] == found[1]
