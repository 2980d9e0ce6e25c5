"""The two array kernels behind the Huffman codec: whole chunks in, whole chunks out.

A native kernel replaces exactly these two functions, ``encode_chunks`` and ``decode_chunks``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gradbits.core.errors import ArgumentError, CorruptDataError

_STEPS = 64  # symbols per lane that are transposed together
_USABLE = 33  # bits of a 64-bit window that are valid at any bit offset within its first 32 bits


def encode_chunks(
    symbols: npt.NDArray[Any], entries: npt.NDArray[np.uint64], chunk: int
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8]]:
    """Encode whole chunks (the last may be short) and return (bytes per chunk, bytes).

    Args:
        symbols: integers in ``[0, A)``, shape (n,), n at least 1.
        entries: code << 4 | length per symbol, shape (A,).
        chunk: symbols per chunk, a multiple of 4.

    Raises:
        ArgumentError: a symbol has no code.
    """
    missing = -symbols.size % 4
    packed = entries.take(symbols)
    bits = (packed & np.uint64(15)).astype(np.uint32)
    if int(bits.min()) == 0:
        raise ArgumentError(f"symbols: {int(symbols[int(bits.argmin())])} has no code (its length is 0)")
    codes = packed >> np.uint64(4)
    if missing:  # filled with codes of no bits
        codes = np.concatenate([codes, np.zeros(missing, np.uint64)])
        bits = np.concatenate([bits, np.zeros(missing, np.uint32)])
    for _ in range(2):  # join neighbours twice: four codes of at most 15 bits fit in one 64-bit word
        codes = (codes[0::2] << bits[1::2].astype(np.uint64)) | codes[1::2]
        bits = bits[0::2] + bits[1::2]
    starts = np.arange(0, bits.size, chunk // 4)
    sizes = (np.add.reduceat(bits, starts, dtype=np.int64) + 7) // 8
    total = int(sizes.sum())
    ends = np.cumsum(bits, dtype=np.int64)
    bases = (np.cumsum(sizes) - sizes) * 8  # first bit of every chunk
    shift = bases - np.concatenate([[0], ends[starts[1:] - 1]])
    position = ends - bits + np.repeat(shift, np.diff(np.append(starts, bits.size)))
    return sizes.astype(np.uint32), _place(codes, bits.astype(np.int64), position, total)


def _place(
    codes: npt.NDArray[np.uint64], bits: npt.NDArray[np.int64], position: npt.NDArray[np.int64], total: int
) -> npt.NDArray[np.uint8]:
    """Write every code (``bits`` long, up to 60) at its bit position in ``total`` bytes; positions do not overlap."""
    words = np.zeros(total // 8 + 2, np.uint64)
    word = position >> 6
    room = 64 - (position & 63) - bits  # negative: the code runs on into the next word
    left = np.maximum(room, 0).astype(np.uint64)
    right = np.maximum(-room, 0).astype(np.uint64)
    high = (codes >> right) << left
    first = np.flatnonzero(np.diff(word, prepend=-1))
    words[word[first]] = np.bitwise_or.reduceat(high, first)
    over = np.flatnonzero(room < 0)  # at most one per word, because a code is shorter than a word
    words[word[over] + 1] |= codes[over] << (64 + room[over]).astype(np.uint64)
    return words.astype(">u8").view(np.uint8)[:total]


def decode_chunks(
    payload: npt.NDArray[np.uint8],
    sizes: npt.NDArray[np.int64],
    chunk: int,
    lengths: npt.NDArray[np.uint8],
    out: npt.NDArray[np.uint16],
) -> None:
    """Decode chunks in lock-step into ``out``: one look-up per step serves one symbol of every chunk.

    Args:
        payload: the chunks, one after the other.
        sizes: bytes per chunk, their sum is the size of ``payload``.
        chunk: symbols per chunk; only the last chunk may hold fewer.
        lengths: a checked, non-empty code, shape (A,).
        out: as many elements as there are symbols.

    Raises:
        CorruptDataError: a chunk does not end where its codes end, or its padding is not zero.
    """
    padded = np.zeros(payload.size // 4 * 4 + 12, np.uint8)
    padded[: payload.size] = payload
    halves = padded.view(">u4").astype(np.uint64)
    windows = (halves[:-1] << np.uint64(32)) | halves[1:]
    ends = np.cumsum(sizes)
    lanes = _Lanes(windows, (ends - sizes) * 8, lengths)
    rest = (sizes.size - 1) * chunk
    short = out.size - rest  # symbols in the last chunk
    lanes.run(0, short, chunk, out)
    position = lanes.position
    if short < chunk and sizes.size > 1:
        others = _Lanes(windows, position[:-1], lengths)
        others.run(short, chunk, chunk, out[:rest])
        position = np.append(others.position, position[-1])
    padding = ends * 8 - position
    masks = (1 << np.clip(padding, 0, 7)) - 1
    if ((padding < 0) | (padding > 7) | ((padded[ends - 1] & masks) != 0)).any():
        raise CorruptDataError("Huffman stream: a chunk does not end where its codes end")


class _Lanes:
    """One reading position (in bits) per chunk, all moved on together."""

    def __init__(
        self, windows: npt.NDArray[np.uint64], position: npt.NDArray[np.int64], lengths: npt.NDArray[np.uint8]
    ) -> None:
        self.windows = windows  # the 64 bits from every 32-bit boundary on
        self.position = position.copy()
        self.longest = int(lengths.max())
        self.table = _lookup_table(lengths, self.longest)

    def run(self, begin: int, end: int, chunk: int, out: npt.NDArray[np.uint16]) -> None:
        """Decode symbols ``begin`` to ``end`` of every chunk to their places in ``out``."""
        lanes, position = self.position.size, self.position
        rows = np.empty((_STEPS, lanes), np.uint16)
        index, pattern, start = (np.empty(lanes, np.int64) for _ in range(3))
        window, length = (np.empty(lanes, np.uint64) for _ in range(2))
        per_window, down = _USABLE // self.longest, np.uint64(64 - self.longest)
        for first in range(begin, end, _STEPS):
            steps = min(_STEPS, end - first)
            for step in range(steps):
                if step % per_window == 0:
                    np.right_shift(position, 5, out=index)
                    # "clip": a damaged lane may run past the end; that is found when all lanes have stopped
                    self.windows.take(index, out=window, mode="clip")
                    np.bitwise_and(position, 31, out=start)
                    np.left_shift(window, start.view(np.uint64), out=window)
                np.right_shift(window, down, out=pattern.view(np.uint64))
                self.table.take(pattern, out=rows[step], mode="clip")
                np.bitwise_and(rows[step], 15, out=length, casting="unsafe")
                np.left_shift(window, length, out=window)
                np.add(position, length.view(np.int64), out=position)
            rows[:steps] >>= 4
            full = out.size // chunk  # chunks that are full; at most one more follows
            out[: full * chunk].reshape(full, chunk)[:, first : first + steps] = rows[:steps, :full].T
            if full < lanes:
                out[full * chunk + first : full * chunk + first + steps] = rows[:steps, full]


def _lookup_table(lengths: npt.NDArray[np.uint8], longest: int) -> npt.NDArray[np.uint16]:
    """Return symbol << 4 | length for every pattern of ``longest`` bits; a pattern that is no code has length 0."""
    order = np.lexsort((np.arange(lengths.size), lengths))
    order = order[lengths[order] > 0]
    spans = 1 << (longest - lengths[order].astype(np.int64))
    entries = (order.astype(np.uint16) << np.uint16(4)) | lengths[order].astype(np.uint16)
    table = np.zeros(1 << longest, np.uint16)
    table[: int(spans.sum())] = np.repeat(entries, spans)
    return table
