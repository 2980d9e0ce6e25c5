"""Huffman coding: optimal lengths, canonical codes, exact round trips, and refusal of everything that is damaged."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradbits.core.errors import ArgumentError, CorruptDataError, DtypeError
from gradbits.kernels.huffman import (
    HuffmanStream,
    canonical_codes,
    check_lengths,
    code_lengths,
    decode,
    encode,
    encoded_bits,
)
from gradbits.kernels.huffman_stream import dumps, dumps_size, loads, pack_lengths, unpack_lengths

CALM = settings(deadline=None)  # the machine may be busy
FUZZ = settings(deadline=None, max_examples=300)
COUNTS = st.lists(st.integers(0, 10_000), min_size=1, max_size=300)


def optimal_bits(counts: list[int]) -> int:
    """The cost of an unlimited Huffman code: the sum of all inner nodes."""
    heap = [count for count in counts if count]
    if len(heap) == 1:
        return heap[0]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        node = heapq.heappop(heap) + heapq.heappop(heap)
        total += node
        heapq.heappush(heap, node)
    return total


@CALM
@given(COUNTS)
def test_lengths_are_optimal_and_complete(counts: list[int]) -> None:
    lengths = code_lengths(counts)
    assert ((np.array(counts) > 0) == (lengths > 0)).all()
    used = lengths[lengths > 0].astype(float)
    if used.size > 1:
        assert (2.0**-used).sum() == 1.0
        best = optimal_bits(counts)
        if int(lengths.max()) < 15:
            assert encoded_bits(counts, lengths) == best
        probabilities = np.array(counts)[lengths > 0] / sum(counts)
        entropy = -(probabilities * np.log2(probabilities)).sum()
        assert entropy - 1e-9 <= encoded_bits(counts, lengths) / sum(counts)


@CALM
@given(COUNTS, st.integers(9, 15))
def test_more_frequent_symbols_never_have_longer_codes_within_the_limit(counts: list[int], limit: int) -> None:
    lengths = code_lengths(counts, limit=limit)
    assert int(lengths.max(initial=0)) <= limit
    order = np.argsort(np.array(counts), kind="stable")
    order = order[np.array(counts)[order] > 0]
    assert (np.diff(lengths[order].astype(int)) <= 0).all()


def test_fibonacci_counts_are_held_to_the_limit() -> None:
    counts = [1, 1]
    while len(counts) < 30:
        counts.append(counts[-1] + counts[-2])
    lengths = code_lengths(counts)
    assert int(lengths.max()) == 15
    assert check_lengths(lengths).tolist() == lengths.tolist()
    tighter = [encoded_bits(counts, code_lengths(counts, limit=limit)) for limit in range(5, 16)]
    assert tighter == sorted(tighter, reverse=True)
    assert tighter[-1] > optimal_bits(counts)


def test_limited_lengths_are_optimal_by_exhaustion() -> None:
    counts = [1, 1, 2, 4, 8, 16]
    best = min(
        sum(c * length for c, length in zip(counts, sorted(shape, reverse=True), strict=True))
        for shape in _complete_shapes(6, 4)
    )
    assert encoded_bits(counts, code_lengths(counts, limit=4)) == best


def _complete_shapes(leaves: int, depth: int) -> set[tuple[int, ...]]:
    if leaves == 1:
        return {(0,)}
    if depth == 0:
        return set()
    shapes = set()
    for left in range(1, leaves):
        for one in _complete_shapes(left, depth - 1):
            for other in _complete_shapes(leaves - left, depth - 1):
                shapes.add(tuple(sorted(length + 1 for length in (*one, *other))))
    return shapes


def test_the_example_of_the_specification() -> None:
    counts = [45, 13, 12, 16, 9, 5]
    lengths = code_lengths(counts)
    assert lengths.tolist() == [1, 3, 3, 3, 4, 4]
    assert canonical_codes(lengths).tolist() == [0b0, 0b100, 0b101, 0b110, 0b1110, 0b1111]
    assert encoded_bits(counts, lengths) == 224


def test_one_symbol_takes_one_bit_each_and_comes_back() -> None:
    lengths = code_lengths([0, 0, 9])
    assert lengths.tolist() == [0, 0, 1]
    stream = encode([2] * 9, lengths)
    assert len(stream.payload) == 2
    assert decode(stream, lengths).tolist() == [2] * 9


def test_nothing_is_coded_as_nothing() -> None:
    stream = encode([], code_lengths([0, 0]))
    assert (stream.count, stream.sizes.size, len(stream.payload)) == (0, 0, 0)
    assert decode(stream, [0, 0]).size == 0


@st.composite
def symbol_lists(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    alphabet = draw(st.sampled_from([1, 2, 3, 8, 33, 256, 4096]))
    size = draw(st.integers(0, 3000))
    skew = draw(st.floats(0.2, 8.0))
    seed = draw(st.integers(0, 2**32 - 1))
    draws = np.random.default_rng(seed).random(size) ** skew * alphabet
    return np.minimum(draws.astype(np.int64), alphabet - 1), alphabet


@CALM
@given(symbol_lists(), st.sampled_from([4, 8, 64, 1024, 65536]))
def test_round_trip(case: tuple[np.ndarray, int], chunk: int) -> None:
    symbols, alphabet = case
    lengths = code_lengths(np.bincount(symbols, minlength=alphabet))
    stream = encode(symbols, lengths, chunk=chunk)
    assert (decode(stream, lengths) == symbols).all()
    bits = encoded_bits(np.bincount(symbols, minlength=alphabet), lengths)
    assert bits <= 8 * len(stream.payload) <= bits + 7 * stream.sizes.size


@CALM
@given(symbol_lists(), st.sampled_from([4, 64, 4096, 65536]))
def test_bytes_round_trip_and_their_size_is_foretold(case: tuple[np.ndarray, int], chunk: int) -> None:
    symbols, alphabet = case
    counts = np.bincount(symbols, minlength=alphabet)
    lengths = code_lengths(counts)
    blob = dumps(symbols, lengths, chunk=chunk)
    found, used = loads(blob + b"more")
    assert used == len(blob)
    assert (found == symbols).all()
    low, high = dumps_size(counts, lengths, chunk=chunk)
    assert low <= len(blob) <= high


def test_chunks_beyond_one_block_of_lanes() -> None:
    symbols = np.random.default_rng(0).integers(0, 5, 4 * 5000 + 3)
    lengths = code_lengths(np.bincount(symbols))
    assert (decode(encode(symbols, lengths, chunk=4), lengths) == symbols).all()


def test_the_same_counts_give_the_same_bytes() -> None:
    symbols = np.arange(10_000) ** 2 % 11
    lengths = code_lengths(np.bincount(symbols))
    blob = dumps(symbols, lengths, chunk=4096)
    assert blob == dumps(symbols.astype(np.uint8), lengths, chunk=4096)
    # fixed: files written once must stay readable, and are to be the same on every platform
    assert blob[-4:].hex() == "fec5cb7f"


@CALM
@given(st.lists(st.integers(0, 15), max_size=600))
def test_tables_round_trip(lengths: list[int]) -> None:
    kind, packed = pack_lengths(lengths)
    try:
        check_lengths(lengths)
    except CorruptDataError:
        with pytest.raises(CorruptDataError):
            unpack_lengths(memoryview(packed), 0, kind, len(lengths))
    else:
        found, used = unpack_lengths(memoryview(packed), 0, kind, len(lengths))
        assert (found.tolist(), used) == (lengths, len(packed))


@pytest.mark.parametrize("lengths", [[1, 1, 1], [2, 2], [1], [16, 1], [3]])
def test_lengths_that_are_no_complete_code_are_refused(lengths: list[int]) -> None:
    if lengths == [1]:
        assert check_lengths(lengths).tolist() == [1]
        return
    with pytest.raises(CorruptDataError):
        check_lengths(lengths)


BLOB = dumps(np.arange(200) % 7, code_lengths(np.bincount(np.arange(200) % 7)), chunk=64)


@pytest.mark.parametrize("size", range(len(BLOB)))
def test_every_truncation_is_refused(size: int) -> None:
    with pytest.raises(CorruptDataError):
        loads(BLOB[:size])


@pytest.mark.parametrize("bit", range(8 * len(BLOB)))
def test_every_bit_flip_is_refused(bit: int) -> None:
    damaged = bytearray(BLOB)
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptDataError):
        loads(bytes(damaged))


@FUZZ
@given(st.binary(max_size=200))
def test_any_bytes_give_symbols_or_a_typed_error(blob: bytes) -> None:
    try:
        symbols, used = loads(b"H\x01" + blob)
    except CorruptDataError:
        return
    assert symbols.size <= 8 * used


@FUZZ
@given(st.binary(min_size=1, max_size=60), st.integers(0, 400), st.sampled_from([4, 16, 512]))
def test_any_payload_decodes_or_is_refused(payload: bytes, count: int, chunk: int) -> None:
    chunks = -(-count // chunk)
    sizes = np.full(chunks, len(payload) // max(chunks, 1), np.uint32)
    if chunks:
        sizes[-1] += len(payload) - int(sizes.sum())
    lengths = code_lengths([5, 3, 1, 1])
    data = np.frombuffer(payload, np.uint8)
    try:
        symbols = decode(HuffmanStream(count=count, chunk=chunk, sizes=sizes, payload=data), lengths)
    except CorruptDataError:
        return
    # canonical: what is accepted is what the encoder writes
    assert encode(symbols, lengths, chunk=chunk).payload.tobytes() == payload


def test_a_huge_count_is_refused_before_memory_is_taken() -> None:
    blob = bytearray(BLOB)
    blob[6:14] = (1 << 60).to_bytes(8, "little")
    with pytest.raises(CorruptDataError, match="symbols claimed"):
        loads(bytes(blob))
    with pytest.raises(CorruptDataError, match="symbols claimed"):
        loads(BLOB, max_symbols=10)


def test_illegal_arguments_are_named() -> None:
    with pytest.raises(ArgumentError, match="at least 0"):
        code_lengths([1, -1])
    with pytest.raises(DtypeError, match="integers"):
        code_lengths([0.5])
    with pytest.raises(ArgumentError, match="limit=2: 5 symbols"):
        code_lengths([1] * 5, limit=2)
    with pytest.raises(ArgumentError, match="has no code"):
        encode([1], [1, 0])
    with pytest.raises(ArgumentError, match="alphabet has 2"):
        encode([2], [1, 1])
    with pytest.raises(ArgumentError, match="multiple of 4"):
        encode([0], [1], chunk=5)
    with pytest.raises(ArgumentError, match="power of two"):
        dumps([0], [1], chunk=12)
    with pytest.raises(DtypeError):
        encode([0.5], [1])
