"""Canonical Huffman coding of integer symbols: lengths from counts, codes, encoding and chunk-parallel decoding.

A stream is cut into chunks of a fixed number of symbols, each starting on a byte. All chunks are decoded in lock-step:
one table look-up serves one symbol of every chunk, so array operations do the work, not a loop over symbols. The array
kernels are in ``huffman_blocks``, the byte form of a stream is in ``huffman_stream``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gradbits.core.checks import check_integer
from gradbits.core.errors import ArgumentError, CorruptDataError, DtypeError
from gradbits.kernels.huffman_blocks import decode_chunks, encode_chunks

MAX_LENGTH = 15
MAX_ALPHABET = 4096
DEFAULT_CHUNK = 65_536

Lengths = npt.NDArray[np.uint8]
Symbols = npt.NDArray[Any]

_ENCODE_BLOCK = 1 << 20  # symbols encoded at a time: temporaries stay within a few tens of MB
_LANES = 4096  # chunks decoded at a time: the working set of one step stays in the second-level cache


@dataclass(frozen=True, kw_only=True)
class HuffmanStream:
    """An encoded sequence: ``count`` symbols in chunks of ``chunk``, chunk i in ``sizes[i]`` bytes of ``payload``."""

    count: int
    chunk: int
    sizes: npt.NDArray[np.uint32]
    payload: npt.NDArray[np.uint8]


def code_lengths(counts: npt.ArrayLike, *, limit: int = MAX_LENGTH) -> Lengths:
    """Return the lengths of an optimal prefix code whose longest code has ``limit`` bits, minimizing ``sum_i c_i l_i``.

    Package-merge; ties go to (count, smaller symbol), leaves before packages, so equal counts give equal lengths on
    every machine. A symbol that does not occur gets length 0 (no code); an alphabet with one occurring symbol gets
    length 1. To reuse the code for later data, pass ``counts + 1``.

    Args:
        counts: occurrences per symbol, shape (A,), integers of at least 0, A up to 4096.
        limit: longest code in bits, 1 to 15.

    Returns:
        uint8 array of shape (A,), in bits.

    Raises:
        ArgumentError: negative counts, an alphabet that is too large, or one that ``limit`` bits cannot hold.
        DtypeError: counts that are not integers.

    >>> code_lengths([45, 13, 12, 16, 9, 5]).tolist()
    [1, 3, 3, 3, 4, 4]
    >>> code_lengths([0, 7]).tolist()
    [0, 1]

    References:
        D. A. Huffman, A method for the construction of minimum-redundancy codes, 1952.
        L. L. Larmore, D. S. Hirschberg, A fast algorithm for optimal length-limited Huffman codes, 1990.
    """
    check_integer(limit, "limit", 1, MAX_LENGTH)
    array = np.asarray(counts)
    if array.size and array.dtype.kind not in "iu":
        raise DtypeError(f"counts: dtype {array.dtype} is not supported; counts are integers")
    if array.ndim != 1 or array.size > MAX_ALPHABET:
        raise ArgumentError(f"counts: shape {array.shape}; must be one axis of at most {MAX_ALPHABET} symbols")
    if array.size and (int(array.min()) < 0 or sum(array.tolist()) >= 1 << 58):
        raise ArgumentError("counts: must be at least 0 and sum to less than 2**58")
    array = array.astype(np.int64)
    used = np.flatnonzero(array)
    lengths = np.zeros(array.size, np.uint8)
    if used.size <= 1:
        lengths[used] = 1
        return lengths
    if used.size > 1 << limit:
        needed = (used.size - 1).bit_length()
        raise ArgumentError(f"limit={limit}: {used.size} symbols need codes of at least {needed} bits")
    used = used[np.argsort(array[used], kind="stable")]
    leaves = array[used]
    leaf_flags = []
    merged = leaves
    flags = np.ones(leaves.size, bool)
    for _ in range(limit - 1):
        leaf_flags.append(flags)
        packages = merged[: merged.size // 2 * 2].reshape(-1, 2).sum(1)
        merged = np.concatenate([leaves, packages])
        order = np.argsort(merged, kind="stable")
        merged, flags = merged[order], order < leaves.size
    taken = 2 * leaves.size - 2
    depth = np.zeros(leaves.size, np.uint8)
    for level in [flags, *reversed(leaf_flags)]:
        chosen = int(level[:taken].sum())
        depth[:chosen] += 1
        taken = 2 * (taken - chosen)
    lengths[used] = depth
    return lengths


def check_lengths(lengths: npt.ArrayLike) -> Lengths:
    """Return ``lengths`` if they are those of a complete prefix code: ``sum_i 2^-l_i = 1``, or one symbol of length 1.

    Raises:
        CorruptDataError: a length above 15, an over-full or an incomplete code.

    >>> check_lengths([1, 2, 2]).tolist()
    [1, 2, 2]
    """
    array = np.asarray(lengths)
    in_range = array.size == 0 or (int(array.min()) >= 0 and int(array.max()) <= MAX_LENGTH)
    if array.ndim != 1 or array.size > MAX_ALPHABET or not in_range:
        raise CorruptDataError(f"Huffman lengths: must be at most {MAX_ALPHABET} numbers from 0 to {MAX_LENGTH}")
    array = array.astype(np.uint8)
    used = array[array > 0].astype(np.int64)
    if used.size == 0 or (used.size == 1 and used[0] == 1):
        return array
    kraft = int((1 << (MAX_LENGTH - used)).sum())
    if kraft != 1 << MAX_LENGTH:
        raise CorruptDataError(f"Huffman lengths: Kraft sum is {kraft / (1 << MAX_LENGTH):.6g}; a complete code has 1")
    return array


def canonical_codes(lengths: npt.ArrayLike) -> npt.NDArray[np.uint32]:
    """Return the canonical codes: symbols by (length, symbol), first code 0, next ``(code + 1) << (length step)``.

    Args:
        lengths: bits per symbol, shape (A,); 0 means no code.

    Returns:
        uint32 array of shape (A,); 0 where there is no code.

    Raises:
        CorruptDataError: the lengths are not those of a complete prefix code.

    >>> [format(c, "b") for c in canonical_codes([1, 3, 3, 3, 4, 4])]
    ['0', '100', '101', '110', '1110', '1111']
    """
    array = check_lengths(lengths)
    codes = np.zeros(array.size, np.uint32)
    code = 0
    for length in range(1, MAX_LENGTH + 1):
        here = np.flatnonzero(array == length)
        codes[here] = code + np.arange(here.size)
        code = (code + here.size) << 1
    return codes


def encoded_bits(counts: npt.ArrayLike, lengths: npt.ArrayLike) -> int:
    """Return ``sum_i c_i l_i``, the bits of the codes alone (without the padding of chunks and without the table).

    >>> encoded_bits([45, 13, 12, 16, 9, 5], [1, 3, 3, 3, 4, 4])
    224
    """
    return int(np.dot(np.asarray(counts, np.int64), np.asarray(lengths, np.int64)))


def encode(symbols: npt.ArrayLike, lengths: npt.ArrayLike, *, chunk: int = DEFAULT_CHUNK) -> HuffmanStream:
    """Encode ``symbols`` with the canonical code of ``lengths``, most significant bit first, chunks padded with zeros.

    Args:
        symbols: integers in ``[0, A)``, shape (n,).
        lengths: bits per symbol, shape (A,).
        chunk: symbols per chunk, a multiple of 4.

    Raises:
        ArgumentError: a symbol that has no code, or an illegal chunk.

    >>> stream = encode([0, 1, 2, 0], [1, 2, 2])
    >>> stream.payload.tolist(), decode(stream, [1, 2, 2]).tolist()
    ([88], [0, 1, 2, 0])
    """
    check_integer(chunk, "chunk", 4, 1 << 24)
    if chunk % 4:
        raise ArgumentError(f"chunk={chunk}: must be a multiple of 4")
    array = _check_symbols(symbols)
    table = check_lengths(lengths)
    if array.size and (int(array.min()) < 0 or int(array.max()) >= table.size):
        seen = f"{int(array.min())} to {int(array.max())}"
        raise ArgumentError(f"symbols: values {seen}; the alphabet has {table.size} symbols")
    entries = (canonical_codes(table).astype(np.uint64) << np.uint64(4)) | table
    sizes, parts = [], []
    step = max(chunk, _ENCODE_BLOCK // chunk * chunk)
    for start in range(0, array.size, step):
        part_sizes, part = encode_chunks(array[start : start + step], entries, chunk)
        sizes.append(part_sizes)
        parts.append(part)
    empty = np.zeros(0, np.uint8)
    return HuffmanStream(
        count=array.size,
        chunk=chunk,
        sizes=np.concatenate([*sizes, np.zeros(0, np.uint32)]).astype(np.uint32),
        payload=np.concatenate([*parts, empty]),
    )


def _check_symbols(symbols: npt.ArrayLike) -> Symbols:
    array = np.asarray(symbols)
    if array.size == 0:
        return np.zeros(0, np.uint8)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise DtypeError(f"symbols: dtype {array.dtype}, {array.ndim} axes; must be integers in one axis")
    return array


def decode(stream: HuffmanStream, lengths: npt.ArrayLike) -> npt.NDArray[np.uint16]:
    """Decode a stream; every bit is accounted for: a damaged one is refused or gives other symbols of the alphabet.

    Args:
        stream: what ``encode`` returned, or what was read from a file.
        lengths: bits per symbol, shape (A,), the same as for ``encode``.

    Returns:
        uint16 array of shape (count,).

    Raises:
        CorruptDataError: sizes, counts and codes do not fit together.

    >>> decode(encode([1, 1, 1], [0, 1]), [0, 1]).tolist()
    [1, 1, 1]
    """
    table = check_lengths(lengths)
    sizes = np.asarray(stream.sizes, np.int64)
    size = len(stream.payload)
    if stream.count < 0 or stream.chunk < 1 or sizes.size != -(-stream.count // stream.chunk) or sizes.sum() != size:
        raise CorruptDataError("Huffman stream: chunk sizes, symbol count and payload length do not fit together")
    if stream.count > 8 * size:
        raise CorruptDataError(f"Huffman stream: {stream.count} symbols cannot come from {size} bytes")
    if stream.count and not table.any():
        raise CorruptDataError("Huffman stream: the alphabet is empty, the stream is not")
    out = np.empty(stream.count, np.uint16)
    ends = np.cumsum(sizes)
    for first in range(0, sizes.size, _LANES):
        some = slice(first, min(first + _LANES, sizes.size))
        begin, end = int(ends[some.start] - sizes[some.start]), int(ends[some.stop - 1])
        block = out[some.start * stream.chunk : some.stop * stream.chunk]
        decode_chunks(np.asarray(stream.payload[begin:end], np.uint8), sizes[some], stream.chunk, table, block)
    return out
