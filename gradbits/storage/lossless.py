"""Lossless coding of elements of any type: their bytes, sorted by significance into planes, Huffman-coded or by zstd.

Bytes of one significance look alike (the exponents of trained weights take few values), so each plane has its own code.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from gradbits.core.checks import check_choice
from gradbits.core.errors import CorruptDataError, MissingDependencyError
from gradbits.kernels.huffman import code_lengths
from gradbits.kernels.huffman_stream import chunk_for, dumps, dumps_size, loads

CODERS = ("huffman", "zstd")
_PLANE = struct.Struct("<BQ")  # 0 = bytes as they are, 1 = Huffman stream; bytes that follow


def encode_planes(data: npt.NDArray[np.uint8], width: int) -> bytes:
    """Return the Huffman-coded byte planes of elements of ``width`` bytes; a plane that does not shrink stays as it is.

    >>> data = np.arange(64, dtype=np.float32).view(np.uint8)
    >>> decode_planes(memoryview(encode_planes(data, 4)), data.size, 4).tobytes() == data.tobytes()
    True
    """
    parts = []
    for plane in data.reshape(-1, width).T:
        counts = np.bincount(plane, minlength=256)
        lengths = code_lengths(counts)
        if dumps_size(counts, lengths, chunk=chunk_for(plane.size))[1] < plane.size:
            kind, body = 1, dumps(plane, lengths, chunk=chunk_for(plane.size))
        else:
            kind, body = 0, plane.tobytes()
        parts += [_PLANE.pack(kind, len(body)), body]
    return b"".join(parts)


def decode_planes(section: memoryview, size: int, width: int) -> npt.NDArray[np.uint8]:
    """Return the ``size`` bytes that ``encode_planes`` was given.

    Raises:
        CorruptDataError: the section is cut short, too long, or holds planes of another size.
    """
    planes = np.empty((size // width, width), np.uint8)
    at = 0
    for column in range(width):
        if at + _PLANE.size > len(section):
            raise CorruptDataError("byte planes: cut short")
        kind, stored = _PLANE.unpack_from(section, at)
        at += _PLANE.size
        body = section[at : at + stored]
        if kind > 1 or len(body) != stored:
            raise CorruptDataError(f"byte planes: kind {kind}, {stored} bytes claimed, {len(body)} found")
        if kind == 1:
            symbols, used = loads(body, max_symbols=planes.shape[0])
            if used != stored or (symbols.size and int(symbols.max()) > 255):
                raise CorruptDataError("byte planes: a plane does not end where its data ends")
            values = symbols.astype(np.uint8)
        else:
            values = np.frombuffer(body, np.uint8)
        if values.size != planes.shape[0]:
            raise CorruptDataError(f"byte planes: {values.size} bytes in a plane of {planes.shape[0]}")
        planes[:, column] = values
        at += stored
    if at != len(section):
        raise CorruptDataError("byte planes: bytes left over")
    return planes.reshape(-1)


def encode_zstd(data: npt.NDArray[np.uint8], width: int, level: int = 3) -> bytes:
    """Return the byte planes, one after the other, compressed by zstd.

    Raises:
        MissingDependencyError: zstandard is not installed.
    """
    planes = np.ascontiguousarray(data.reshape(-1, width).T)
    compressed = _zstandard().ZstdCompressor(level=level, write_content_size=True).compress(planes.tobytes())
    return bytes(compressed)


def decode_zstd(section: memoryview, size: int, width: int) -> npt.NDArray[np.uint8]:
    """Return the ``size`` bytes that ``encode_zstd`` was given; no more than that is ever allocated.

    Raises:
        CorruptDataError: not one zstd frame of ``size`` bytes.
        MissingDependencyError: zstandard is not installed.
    """
    zstd = _zstandard()
    try:
        if zstd.frame_content_size(section) != size:
            raise CorruptDataError(f"zstd frame: does not declare {size} bytes")
        decompressor = zstd.ZstdDecompressor(max_window_size=1 << 27)
        data = decompressor.decompress(section, max_output_size=size, allow_extra_data=False)
    except zstd.ZstdError as error:
        raise CorruptDataError(f"zstd frame: {error}") from error
    if len(data) != size:
        raise CorruptDataError(f"zstd frame: {len(data)} bytes, {size} expected")
    return np.ascontiguousarray(np.frombuffer(data, np.uint8).reshape(width, -1).T).reshape(-1)


def require_coder(coder: str) -> None:
    """Check that ``coder`` is a name in ``CODERS`` and that what it needs is installed.

    Raises:
        ArgumentError: unknown name.
        MissingDependencyError: zstandard is not installed.
    """
    check_choice(coder, "coder", CODERS)
    if coder == "zstd":
        _zstandard()


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise MissingDependencyError(
            "coder='zstd' needs the package zstandard: pip install 'gradbits[zstd]', or use coder='huffman'"
        ) from error
    return zstandard
