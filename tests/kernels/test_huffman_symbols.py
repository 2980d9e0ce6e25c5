"""Huffman-coded symbols as a message: exact round trips, and refusal of everything else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradbits.core.errors import ArgumentError, CorruptDataError, DtypeError
from gradbits.kernels.huffman import code_lengths, encoded_bits
from gradbits.kernels.huffman_symbols import count_symbols, decode_symbols, encode_symbols


def drawn(count, alphabet, skew, seed):
    """Symbols of which the first are the more frequent, the more so the larger ``skew``."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.exp(-skew * torch.arange(alphabet, dtype=torch.float64))
    if not count:
        return torch.zeros(0, dtype=torch.uint8)
    return torch.multinomial(weights, count, replacement=True, generator=generator).to(torch.uint8)


def lengths_for(symbols, alphabet, limit=15):
    """The best lengths for these symbols."""
    return torch.from_numpy(code_lengths(count_symbols(symbols, alphabet).numpy(), limit=limit))


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(0, 3000),
    alphabet=st.integers(1, 256),
    skew=st.sampled_from([0.0, 0.05, 0.5, 3.0]),
    chunk=st.sampled_from([8, 64, 1024, 8192]),
    seed=st.integers(0, 999),
)
def test_round_trip(count, alphabet, skew, chunk, seed):
    symbols = drawn(count, alphabet, skew, seed)
    lengths = lengths_for(symbols, alphabet)
    message = encode_symbols(symbols, lengths, chunk=chunk)
    assert torch.equal(decode_symbols(message, max_symbols=count), symbols)
    bits = encoded_bits(count_symbols(symbols, alphabet).numpy(), lengths.numpy())
    chunks = -(-count // chunk)
    assert message.numel() <= 14 + (alphabet + 1) // 2 + 2 * chunks + (bits + 7 * chunks) // 8


def test_large_messages_and_long_chunks():
    """Several encoder blocks; sizes that need four bytes."""
    symbols = drawn(1_500_000, 8, 0.9, 1)
    for chunk in (1 << 13, 1 << 16, 1 << 20):
        message = encode_symbols(symbols, lengths_for(symbols, 8), chunk=chunk)
        assert torch.equal(decode_symbols(message), symbols)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_damage_is_refused_or_gives_symbols(data):
    """Flipped, cut, lengthened and invented bytes; the number of symbols is then still bounded by the message."""
    symbols = drawn(data.draw(st.integers(1, 400)), 9, 0.4, 3)
    message = encode_symbols(symbols, lengths_for(symbols, 9), chunk=64)
    how = data.draw(st.sampled_from(["flip", "cut", "more", "random", "head"]))
    if how == "flip":
        at = data.draw(st.integers(0, message.numel() - 1))
        message[at] ^= data.draw(st.integers(1, 255))
    elif how == "cut":
        message = message[: data.draw(st.integers(0, message.numel() - 1))]
    elif how == "more":
        message = torch.cat([message, torch.tensor(data.draw(st.lists(st.integers(0, 255), min_size=1, max_size=9)))])
        message = message.to(torch.uint8)
    else:
        noise = data.draw(st.binary(min_size=1, max_size=200))
        kept = 4 if how == "head" else 0
        message = torch.cat([message[:kept], torch.tensor(list(noise), dtype=torch.uint8)])
    try:
        found = decode_symbols(message)
    except CorruptDataError:
        return
    assert found.dtype == torch.uint8
    assert found.numel() <= 8 * message.numel()
    assert how not in ("cut", "more")


def test_padding_must_be_zero_and_counts_must_fit():
    symbols = torch.tensor([0, 1, 2, 0], dtype=torch.uint8)
    message = encode_symbols(symbols, torch.tensor([1, 2, 2], dtype=torch.uint8))
    for bit in range(2):  # six bits are used
        bad = message.clone()
        bad[-1] |= 1 << bit
        with pytest.raises(CorruptDataError, match="end where its codes end"):
            decode_symbols(bad)
    with pytest.raises(CorruptDataError, match="4 symbols claimed"):
        decode_symbols(message, max_symbols=3)
    many = message.clone()
    many[6:14] = torch.from_numpy(np.array([1 << 60], np.int64).view(np.uint8).copy())
    with pytest.raises(CorruptDataError, match="symbols claimed"):
        decode_symbols(many)


def test_illegal_arguments():
    symbols, lengths = torch.tensor([0, 3], dtype=torch.uint8), torch.tensor([1, 2, 2, 0], dtype=torch.uint8)
    with pytest.raises(ArgumentError, match="3 has no code"):
        encode_symbols(symbols, lengths)
    with pytest.raises(ArgumentError, match="alphabet has 3 symbols"):
        encode_symbols(symbols, lengths[:3])
    with pytest.raises(CorruptDataError, match="Kraft"):
        encode_symbols(symbols, torch.tensor([1, 1, 1, 1], dtype=torch.uint8))
    with pytest.raises(DtypeError, match="flat uint8"):
        encode_symbols(symbols.int(), lengths)
    with pytest.raises(DtypeError, match="A <= 256"):
        encode_symbols(symbols, torch.zeros(257, dtype=torch.uint8))
    for chunk in (0, 4, 12, 1 << 25):
        with pytest.raises(ArgumentError, match="chunk"):
            encode_symbols(symbols[:1], lengths, chunk=chunk)
    with pytest.raises(ArgumentError, match="one is 3; the alphabet has 3"):
        count_symbols(symbols, 3)
    with pytest.raises(DtypeError):
        decode_symbols(torch.zeros(4, dtype=torch.int8))
