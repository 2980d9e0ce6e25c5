"""Huffman-coded symbols through the native library; the same bytes as ``gradbits.kernels.huffman_symbols``."""

from __future__ import annotations

import ctypes

import torch

from gradbits.core.errors import ArgumentError, CorruptDataError
from gradbits.kernels.huffman_symbols import join_sizes, split_body
from gradbits.kernels.native import library

_WORK = 10 << 15  # bytes of the decoder's tables where codes have up to 15 bits
_LANES = 8


class HuffmanArgs(ctypes.Structure):
    """``HuffmanArgs`` of wire.h."""

    _fields_ = [
        ("symbols", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("sizes", ctypes.c_void_p),
        ("payload", ctypes.c_void_p),
        ("work", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("chunk", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
        ("alphabet", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]


class CountArgs(ctypes.Structure):
    """``CountArgs`` of wire.h."""

    _fields_ = [
        ("symbols", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("alphabet", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]


def count_symbols(symbols: torch.Tensor, alphabet: int) -> torch.Tensor:
    """Return how often each symbol occurs, as ``huffman_symbols.count_symbols`` does."""
    lib, flat = library.loaded(), symbols.contiguous()
    counts = torch.zeros(256, dtype=torch.int64)
    lib.call("gradbits_count", CountArgs(flat.data_ptr(), counts.data_ptr(), flat.numel(), alphabet, lib.threads))
    counts = counts[:alphabet]
    if int(counts.sum()) != flat.numel():
        raise ArgumentError(f"symbols: one is {int(flat.max())}; the alphabet has {alphabet} symbols")
    return counts


def huffman_encode(symbols: torch.Tensor, lengths: torch.Tensor, chunk: int, head: bytes) -> torch.Tensor:
    """Return head, sizes and chunks as ``huffman_symbols`` does; ``lengths`` are those of a complete code."""
    lib, flat = library.loaded(), symbols.contiguous()
    chunks = -(-flat.numel() // chunk)
    if not chunks:
        return torch.frombuffer(bytearray(head), dtype=torch.uint8)
    sizes = torch.empty(chunks, dtype=torch.int32)
    most = (min(chunk, flat.numel()) * int(lengths.max()) + 7) // 8 if lengths.numel() else 0
    begin = len(head) + chunks * (2 if chunk <= 1 << 15 else 4)
    message = torch.empty(begin + chunks * (most + 8) + 8, dtype=torch.uint8)
    args = HuffmanArgs(
        flat.data_ptr(), lengths.data_ptr(), sizes.data_ptr(), message.data_ptr() + begin, None,
        flat.numel(), min(chunk, flat.numel()), 0, lengths.numel(), lib.threads,
    )  # fmt: skip
    if lib.status("gradbits_huffman_encode", args):
        raise ArgumentError(_without_code(flat, lengths))
    message[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    message[len(head) : begin] = join_sizes(sizes, chunk)
    # the room for the worst case is given back
    return message[: begin + int(sizes.sum(dtype=torch.int64))].clone()


def _without_code(symbols: torch.Tensor, lengths: torch.Tensor) -> str:
    largest = int(symbols.max())
    if largest >= lengths.numel():
        return f"symbols: values {int(symbols.min())} to {largest}; the alphabet has {lengths.numel()} symbols"
    missing = int(symbols[lengths[symbols.int()] == 0][0])
    return f"symbols: {missing} has no code (its length is 0)"


def huffman_decode(body: torch.Tensor, lengths: torch.Tensor, chunk: int, count: int) -> torch.Tensor:
    """Return the symbols of ``body`` as ``huffman_symbols`` does; ``lengths`` are those of a complete code."""
    lib = library.loaded()
    sizes, payload = split_body(body.contiguous(), chunk, count)
    symbols = torch.empty(count, dtype=torch.uint8)
    if not count:
        return symbols
    chunk = min(chunk, count)
    sizes = sizes.to(torch.int32)
    work = torch.empty(_WORK // 8 + sizes.numel() // _LANES + 1, dtype=torch.int64)
    args = HuffmanArgs(
        symbols.data_ptr(), lengths.data_ptr(), sizes.data_ptr(), payload.data_ptr(), work.data_ptr(),
        count, chunk, payload.numel(), lengths.numel(), lib.threads,
    )  # fmt: skip
    if lib.status("gradbits_huffman_decode", args):
        raise CorruptDataError("Huffman symbols: a chunk does not end where its codes end")
    return symbols
