"""A Huffman stream as bytes: what is needed to decode it, its code table included, with a checksum.

Layout, little endian: "H", version 1, log2 of the chunk, table kind (u8 each); alphabet size (u16); number of symbols
(u64); table; bytes of every chunk (u16 each for chunks up to 32,768 symbols, else u32); payload; CRC-32 of all of it
(u32). Table kinds: 0 = two lengths per byte, the first in the high half; 1 = runs, one byte each: the length
in the high half, the run less one in the low half.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
import numpy.typing as npt

from gradbits.core.errors import ArgumentError, CorruptDataError
from gradbits.kernels.huffman import DEFAULT_CHUNK, MAX_ALPHABET, HuffmanStream, Lengths, check_lengths, decode, encode

_HEAD = struct.Struct("<4sHQ")
_CRC = struct.Struct("<I")
_VERSION = 1
_MAX_CHUNK_LOG = 24


def chunk_for(count: int) -> int:
    """Return a chunk, 1024 to 4096 symbols, that gives about as many chunks as symbols in a chunk.

    More chunks decode faster, because they are decoded in lock-step; each costs 2 bytes and up to 7 bits.

    >>> chunk_for(10_000), chunk_for(6_000_000), chunk_for(10**9)
    (1024, 2048, 4096)
    """
    return 1024 if count < 1 << 22 else 2048 if count < 1 << 24 else 4096


def dumps(symbols: npt.ArrayLike, lengths: npt.ArrayLike, *, chunk: int = DEFAULT_CHUNK) -> bytes:
    """Return ``symbols`` encoded with ``lengths`` as one self-contained byte string.

    Args:
        symbols: integers in ``[0, A)``, shape (n,).
        lengths: bits per symbol, shape (A,).
        chunk: symbols per chunk, a power of two from 4 to 2**24.

    Raises:
        ArgumentError: an illegal chunk, or a symbol without a code.

    >>> blob = dumps([0, 1, 2, 0], [1, 2, 2], chunk=16)
    >>> loads(blob)[0].tolist(), loads(blob)[1] == len(blob)
    ([0, 1, 2, 0], True)
    """
    if chunk & (chunk - 1):
        raise ArgumentError(f"chunk={chunk}: must be a power of two")
    table = check_lengths(lengths)
    stream = encode(symbols, table, chunk=chunk)
    kind, packed = pack_lengths(table)
    head = _HEAD.pack(bytes([ord("H"), _VERSION, chunk.bit_length() - 1, kind]), table.size, stream.count)
    body = b"".join([head, packed, stream.sizes.astype(_size_type(chunk)).tobytes(), stream.payload.tobytes()])
    return body + _CRC.pack(zlib.crc32(body))


def loads(blob: bytes | memoryview, *, max_symbols: int | None = None) -> tuple[npt.NDArray[np.uint16], int]:
    """Decode the stream at the start of ``blob`` and return (symbols, bytes used); memory is in proportion to ``blob``.

    Args:
        blob: bytes that begin with a stream; more may follow.
        max_symbols: refuse a stream that claims more symbols than this.

    Raises:
        CorruptDataError: anything that ``dumps`` would not have written.

    >>> loads(b"H")
    Traceback (most recent call last):
    gradbits.core.errors.CorruptDataError: Huffman stream: 1 bytes are too few for its head
    """
    view = memoryview(blob)
    if len(view) < _HEAD.size:
        raise CorruptDataError(f"Huffman stream: {len(view)} bytes are too few for its head")
    mark, alphabet, count = _HEAD.unpack_from(view)
    kind, chunk_log = mark[3], mark[2]
    if mark[:2] != bytes([ord("H"), _VERSION]) or not 2 <= chunk_log <= _MAX_CHUNK_LOG or alphabet > MAX_ALPHABET:
        raise CorruptDataError(f"Huffman stream: unknown head {mark.hex()}, alphabet {alphabet}")
    if count > 8 * len(view) or (max_symbols is not None and count > max_symbols):
        raise CorruptDataError(f"Huffman stream: {count} symbols claimed in {len(view)} bytes")
    lengths, at = unpack_lengths(view, _HEAD.size, kind, alphabet)
    chunk = 1 << chunk_log
    chunks = -(-count // chunk)
    wide = np.dtype(_size_type(chunk))
    if at + chunks * wide.itemsize > len(view):
        raise CorruptDataError("Huffman stream: cut short in its chunk sizes")
    sizes = np.frombuffer(view, wide, chunks, at).astype(np.uint32)
    at += chunks * wide.itemsize
    end = at + int(sizes.sum(dtype=np.int64))
    if end + _CRC.size > len(view):
        raise CorruptDataError(f"Huffman stream: {end + _CRC.size} bytes expected, {len(view)} found")
    if _CRC.unpack_from(view, end)[0] != zlib.crc32(view[:end]):
        raise CorruptDataError("Huffman stream: checksum does not match")
    payload = np.frombuffer(view, np.uint8, end - at, at)
    return decode(HuffmanStream(count=count, chunk=chunk, sizes=sizes, payload=payload), lengths), end + _CRC.size


def dumps_size(counts: npt.ArrayLike, lengths: Lengths, *, chunk: int = DEFAULT_CHUNK) -> tuple[int, int]:
    """Return the least and the greatest number of bytes that ``dumps`` takes for symbols with these counts.

    They differ by the padding alone, less than a byte per chunk.

    >>> from gradbits.kernels.huffman import code_lengths
    >>> low, high = dumps_size([2, 1, 1], code_lengths([2, 1, 1]), chunk=16)
    >>> low <= len(dumps([0, 1, 2, 0], [1, 2, 2], chunk=16)) <= high
    True
    """
    occurrences = np.asarray(counts, np.int64)
    bits = int(np.dot(occurrences, np.asarray(lengths, np.int64)))
    chunks = -(-int(occurrences.sum()) // chunk)
    fixed = _HEAD.size + len(pack_lengths(lengths)[1]) + chunks * np.dtype(_size_type(chunk)).itemsize + _CRC.size
    return fixed + -(-bits // 8), fixed + (bits + 7 * chunks) // 8


def pack_lengths(lengths: npt.ArrayLike) -> tuple[int, bytes]:
    """Return (kind, bytes) of the shorter of the two table forms: half a byte per symbol, or runs of equal lengths.

    >>> pack_lengths([1, 3, 3, 3, 4, 4]), pack_lengths([5] * 32)
    ((0, b'\\x133D'), (1, b'__'))
    """
    table = np.asarray(lengths, np.uint8)
    even = np.append(table, np.zeros(table.size % 2, np.uint8)).astype(np.uint8)
    nibbles = (even[0::2] << 4 | even[1::2]).tobytes()
    starts = np.flatnonzero(np.diff(table.astype(np.int64), prepend=-1))
    runs = bytearray()
    for start, stop in zip(starts.tolist(), np.append(starts, table.size)[1:].tolist(), strict=True):
        left = stop - start
        while left:
            run = min(left, 16)
            runs.append(int(table[start]) << 4 | (run - 1))
            left -= run
    return (1, bytes(runs)) if len(runs) < len(nibbles) else (0, nibbles)


def unpack_lengths(view: memoryview, at: int, kind: int, alphabet: int) -> tuple[Lengths, int]:
    """Read the table of ``alphabet`` lengths at offset ``at``; return (checked lengths, offset after the table).

    Raises:
        CorruptDataError: cut short, of unknown kind, or not a complete prefix code.
    """
    if kind == 0:
        size = (alphabet + 1) // 2
        packed = np.frombuffer(view[at : at + size], np.uint8)
        both = np.stack([packed >> 4, packed & 15], 1).reshape(-1)
        if packed.size < size or both[alphabet:].any():
            raise CorruptDataError("Huffman table: cut short")
        return check_lengths(both[:alphabet]), at + size
    if kind != 1:
        raise CorruptDataError(f"Huffman table: unknown kind {kind}")
    packed = np.frombuffer(view[at : at + alphabet], np.uint8)
    reach = np.cumsum((packed & 15).astype(np.int64) + 1)
    used = int(np.searchsorted(reach, alphabet)) + 1 if alphabet else 0
    if alphabet and (used > packed.size or int(reach[used - 1]) != alphabet):
        raise CorruptDataError("Huffman table: its runs do not add up to the alphabet")
    runs = packed[:used]
    return check_lengths(np.repeat(runs >> 4, (runs & 15).astype(np.int64) + 1)), at + used


def _size_type(chunk: int) -> str:
    return "<u2" if chunk <= 1 << 15 else "<u4"
