"""The section of a shared tensor: codebook, Huffman-coded values, and where the non-zeros are, in its cheapest form.

* ``dense``: the codes of all elements in one stream, zero among them;
* ``bitmap``: one bit per element, eight of them a Huffman symbol, and the codes of the non-zeros;
* ``gap3`` to ``gap8``: relative index with that many bits; a filler zero has the value code 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gradbits.core.errors import ArgumentError, CorruptDataError
from gradbits.kernels.huffman import code_lengths
from gradbits.kernels.huffman_stream import chunk_for, dumps, dumps_size, loads
from gradbits.storage.dtypes import from_bytes, to_bytes, unsigned
from gradbits.storage.layout import INDEXES, Entry, expands_too_much
from gradbits.storage.relative import GapHistogram, absolute_index, relative_index
from gradbits.storage.sharing import Shared

Codes = npt.NDArray[np.uint16]
Counts = npt.NDArray[np.int64]


class IndexCosts:
    """Size in bytes of every way to say where the non-zeros are; does not depend on the values of the codes.

    Args:
        mask: True at the non-zeros, shape (numel,).
        indexes: which forms are allowed, see ``layout.INDEXES``.
    """

    def __init__(self, mask: npt.NDArray[np.bool_], indexes: tuple[str, ...] = INDEXES) -> None:
        self.zeros = mask.size - int(np.count_nonzero(mask))
        self.options: dict[str, tuple[int, int, int]] = {}  # name -> least bytes, greatest bytes, zero symbols
        gaps = None
        if not self.zeros and "dense" in indexes:
            indexes = ("dense",)  # every other form says the same and adds a stream
        for index in indexes:
            if index == "dense":
                self.options[index] = (0, 0, self.zeros)
            elif index == "bitmap":
                counts = np.bincount(np.packbits(mask), minlength=256)
                self.options[index] = (*_stream_size(counts), 0)
            else:
                gaps = gaps or GapHistogram(np.flatnonzero(mask))
                counts, fillers = gaps.symbols(int(index[3:]))
                self.options[index] = (*_stream_size(counts), fillers)

    def sizes(self, values: Counts) -> dict[str, tuple[int, int]]:
        """Return (least, greatest) bytes of both streams per form, for ``values[i]`` weights at centroid i + 1."""
        sizes = {}
        for index, (low, high, zeros) in self.options.items():
            counts = np.concatenate([[zeros], values])
            least, greatest = _stream_size(counts)
            sizes[index] = (low + least, high + greatest)
        return sizes

    def best(self, values: Counts, overhead: int) -> int:
        """Return the size in bytes of the cheapest form plus ``overhead``; padding is counted at its greatest."""
        return min(high for _, high in self.sizes(values).values()) + overhead


def encode_shared(shared: Shared, *, indexes: tuple[str, ...] = INDEXES) -> tuple[bytes, dict[str, Any]]:
    """Return (section, what the header has to say) for a shared tensor, in the form that takes the fewest bytes.

    Args:
        shared: codes and codebook.
        indexes: the forms to choose from; a tensor so sparse that they all exceed the format's limit of expansion
            gets a bitmap, which never does.

    Raises:
        ArgumentError: no form, or an unknown one.

    >>> from gradbits.storage.sharing import share
    >>> section, extra = encode_shared(share(torch.tensor([0.0, 1.0, 1.0, 0.0]), 2))
    >>> extra
    {'k': 1, 'nnz': 2, 'index': 'dense'}
    """
    if not indexes or any(index not in INDEXES for index in indexes):
        raise ArgumentError(f"indexes={indexes!r}: must be some of {', '.join(INDEXES)}")
    codes = shared.codes
    mask = codes != 0
    book = to_bytes(shared.codebook).tobytes()
    sizes = IndexCosts(mask, indexes).sizes(shared.counts()[1:])
    limit = min(high for _, high in sizes.values())
    sections: list[tuple[int, int, str, bytes]] = []  # only those that padding could decide between are written out
    for index, (low, _) in sizes.items():
        if low <= limit:
            section = book + _BUILDERS[index.rstrip("0123456789")](codes, mask, shared.codebook.numel() + 1, index)
            sections.append((len(section), len(sections), index, section))
    fitting = [one for one in sections if not expands_too_much(codes.size * shared.codebook.element_size(), one[0])]
    if not fitting:
        section = book + _bitmap(codes, mask, shared.codebook.numel() + 1, "bitmap")
        fitting = [(len(section), 0, "bitmap", section)]
    _, _, index, section = min(fitting)
    return section, {"k": shared.codebook.numel(), "nnz": int(np.count_nonzero(mask)), "index": index}


def _stream(symbols: npt.NDArray[Any], alphabet: int) -> bytes:
    counts = np.bincount(symbols, minlength=alphabet) if symbols.size else np.zeros(alphabet, np.int64)
    return dumps(symbols, code_lengths(counts), chunk=chunk_for(symbols.size))


def _stream_size(counts: Counts) -> tuple[int, int]:
    return dumps_size(counts, code_lengths(counts), chunk=chunk_for(int(counts.sum())))


def _dense(codes: Codes, mask: npt.NDArray[np.bool_], alphabet: int, index: str) -> bytes:
    return _stream(codes, alphabet)


def _bitmap(codes: Codes, mask: npt.NDArray[np.bool_], alphabet: int, index: str) -> bytes:
    return _stream(codes[mask], alphabet) + _stream(np.packbits(mask), 256)


def _gap(codes: Codes, mask: npt.NDArray[np.bool_], alphabet: int, index: str) -> bytes:
    longest = 1 << int(index[3:])
    gaps, is_real = relative_index(np.flatnonzero(mask), longest)
    values = np.zeros(gaps.size, np.uint16)
    values[is_real] = codes[mask]
    return _stream(values, alphabet) + _stream((gaps - 1).astype(np.uint8), longest)


_BUILDERS: dict[str, Callable[[Codes, npt.NDArray[np.bool_], int, str], bytes]] = {
    "dense": _dense,
    "bitmap": _bitmap,
    "gap": _gap,
}


def decode_shared(section: memoryview, entry: Entry) -> torch.Tensor:
    """Return the tensor of a section whose header entry has been checked.

    Raises:
        CorruptDataError: the section is not what ``encode_shared`` writes for such an entry.
    """
    word = unsigned(entry.dtype)
    k, nonzero, index = entry.extra["k"], entry.extra["nnz"], entry.extra["index"]
    size = entry.nbytes // word.itemsize
    if k * word.itemsize > len(section):
        raise CorruptDataError(f"codebook of {k} centroids in a section of {len(section)} bytes")
    table = np.zeros(k + 1, word)
    table[1:] = np.frombuffer(section, word, k)
    values, at = loads(section[k * word.itemsize :], max_symbols=size)
    at += k * word.itemsize
    if values.size and int(values.max()) > k:
        raise CorruptDataError(f"code {int(values.max())} in a codebook of {k} centroids")
    if int(np.count_nonzero(values)) != nonzero:
        raise CorruptDataError(f"{int(np.count_nonzero(values))} non-zeros found, {nonzero} expected")
    words = np.zeros(size, word) if index != "dense" else table.take(values)
    if index == "bitmap":
        marks, used = loads(section[at:], max_symbols=-(-size // 8))
        at += used
        words[_mask(marks, size, values.size)] = table.take(values)
    elif index != "dense":
        gaps, used = loads(section[at:], max_symbols=values.size)
        at += used
        if gaps.size and int(gaps.max()) >= 1 << int(index[3:]):
            raise CorruptDataError(f"gap {int(gaps.max()) + 1} with an index of {index[3:]} bits")
        is_real = values != 0
        places = absolute_index(gaps.astype(np.int64) + 1, is_real, size=size)
        words[places] = table.take(values[is_real])
    if at != len(section) or words.size != size:
        raise CorruptDataError(f"section of {len(section)} bytes for {size} elements does not end where its data ends")
    return from_bytes(words, entry.dtype, entry.shape)


def _mask(marks: npt.NDArray[np.uint16], size: int, expected: int) -> npt.NDArray[np.bool_]:
    if marks.size != -(-size // 8) or (marks.size and int(marks.max()) > 255):
        raise CorruptDataError(f"bitmap of {marks.size} bytes for {size} elements")
    bits = np.unpackbits(marks.astype(np.uint8)).view(bool)
    if bits[size:].any() or int(np.count_nonzero(bits)) != expected:
        raise CorruptDataError("bitmap does not mark as many elements as there are values")
    return bits[:size]
