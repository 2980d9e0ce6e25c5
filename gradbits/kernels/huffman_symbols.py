"""Huffman-coded symbols of at most 256 kinds as one flat tensor of bytes, for messages that carry their own checksum.

Layout, little endian: "H", version 2, log2 of the chunk, table kind (u8 each); alphabet size (u16); number of symbols
(u64); table; bytes of every chunk (u16 each for chunks up to 32,768 symbols, else u32); chunks. Table, chunks and codes
are those of ``huffman_stream``, whose version 1 adds a CRC-32. Chunks are independent streams of contiguous symbols, so
a fast decoder reads several of them in turn, and threads share them out.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import torch

from gradbits.core.checks import check_instance, check_integer
from gradbits.core.errors import ArgumentError, CorruptDataError, DtypeError
from gradbits.kernels import dispatch, huffman
from gradbits.kernels.dispatch import Kernel, Request
from gradbits.kernels.huffman_stream import pack_lengths, unpack_lengths

MAX_ALPHABET = 256
DEFAULT_CHUNK = 8192
_HEAD = struct.Struct("<4sHQ")
_MARK, _VERSION = ord("H"), 2


def count_symbols(symbols: torch.Tensor, alphabet: int) -> torch.Tensor:
    """Return how often each of the symbols below ``alphabet`` occurs, int64 of shape [alphabet].

    Args:
        symbols: flat uint8 tensor.
        alphabet: 1 to 256.

    Raises:
        ArgumentError: a symbol is not below ``alphabet``.

    >>> count_symbols(torch.tensor([2, 0, 2], dtype=torch.uint8), 3).tolist()
    [1, 0, 2]
    """
    _check_symbols(symbols)
    check_integer(alphabet, "alphabet", 1, MAX_ALPHABET)
    return dispatch.run("count_symbols", Request(symbols.device.type), "auto", symbols, alphabet)


def encode_symbols(symbols: torch.Tensor, lengths: torch.Tensor, *, chunk: int = DEFAULT_CHUNK) -> torch.Tensor:
    """Return ``symbols`` coded with the canonical code of ``lengths``, as a flat uint8 tensor that tells all of it.

    Args:
        symbols: flat uint8 tensor [n].
        lengths: bits of every symbol's code, uint8 [A], A at most 256, as from ``huffman.code_lengths``; 0 where a
            symbol does not occur. Codes of at most 11 bits are decoded fastest.
        chunk: symbols per chunk, a power of two from 8 to 2^24.

    Raises:
        DtypeError: ``symbols`` or ``lengths`` are not flat uint8 tensors.
        ArgumentError: a symbol without a code, or an illegal chunk or alphabet.
        CorruptDataError: the lengths are not those of a complete prefix code.

    >>> message = encode_symbols(torch.tensor([0, 1, 2, 0]).byte(), torch.tensor([1, 2, 2]).byte())
    >>> message.numel(), decode_symbols(message).tolist()
    (19, [0, 1, 2, 0])
    """
    _check_symbols(symbols)
    table = _check_lengths(lengths)
    check_integer(chunk, "chunk", 8, 1 << 24)
    if chunk & (chunk - 1):
        raise ArgumentError(f"chunk={chunk}: must be a power of two")
    kind, packed = pack_lengths(table)
    mark = bytes([_MARK, _VERSION, chunk.bit_length() - 1, kind])
    head = _HEAD.pack(mark, table.size, symbols.numel()) + packed
    request = Request(symbols.device.type)
    return dispatch.run("huffman_encode", request, "auto", symbols, torch.from_numpy(table), chunk, head)


def decode_symbols(message: torch.Tensor, *, max_symbols: int | None = None) -> torch.Tensor:
    """Return the symbols of ``message`` as a flat uint8 tensor; memory is in proportion to the message.

    A damaged message is refused or gives other symbols of the alphabet; its carrier's checksum tells the latter.

    Args:
        message: flat uint8 tensor, what ``encode_symbols`` returned and nothing more.
        max_symbols: refuse a message that claims more symbols than this.

    Raises:
        CorruptDataError: anything that ``encode_symbols`` would not have returned.

    >>> decode_symbols(torch.zeros(3, dtype=torch.uint8))
    Traceback (most recent call last):
    gradbits.core.errors.CorruptDataError: Huffman symbols: 3 bytes are too few for the head
    """
    check_instance(message, "message", torch.Tensor)
    if message.dtype != torch.uint8 or message.dim() != 1:
        raise DtypeError(f"message: {message.dtype}, {message.dim()} axes; must be a flat uint8 tensor")
    if message.numel() < _HEAD.size:
        raise CorruptDataError(f"Huffman symbols: {message.numel()} bytes are too few for the head")
    view = memoryview(message[: _HEAD.size + MAX_ALPHABET].cpu().numpy().tobytes())
    mark, alphabet, count = _HEAD.unpack_from(view)
    chunk_log, kind = mark[2], mark[3]
    if mark[:2] != bytes([_MARK, _VERSION]) or not 3 <= chunk_log <= 24 or alphabet > MAX_ALPHABET:
        raise CorruptDataError(f"Huffman symbols: unknown head {mark.hex()}, alphabet {alphabet}")
    if count > 8 * message.numel() or (max_symbols is not None and count > max_symbols):
        raise CorruptDataError(f"Huffman symbols: {count} symbols claimed in {message.numel()} bytes")
    table, at = unpack_lengths(view, _HEAD.size, kind, alphabet)
    if count and not table.any():
        raise CorruptDataError("Huffman symbols: the alphabet is empty, the message is not")
    body, request = message[at:], Request(message.device.type)
    return dispatch.run("huffman_decode", request, "auto", body, torch.from_numpy(table), 1 << chunk_log, count)


def split_body(body: torch.Tensor, chunk: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (int64 bytes of every chunk, chunks) of what follows the head.

    Raises:
        CorruptDataError: the sizes do not add up to the chunks.
    """
    wide = 2 if chunk <= 1 << 15 else 4
    chunks = -(-count // chunk)
    if body.numel() < wide * chunks:
        raise CorruptDataError("Huffman symbols: cut short in the chunk sizes")
    kind = np.dtype("<u2" if wide == 2 else "<u4")
    sizes = np.frombuffer(body[: wide * chunks].cpu().numpy().tobytes(), kind).astype(np.int64)
    payload = body[wide * chunks :]
    if int(sizes.sum()) != payload.numel():
        raise CorruptDataError(f"Huffman symbols: {int(sizes.sum())} bytes of chunks told, {payload.numel()} found")
    return torch.from_numpy(sizes), payload


def join_sizes(sizes: torch.Tensor, chunk: int) -> torch.Tensor:
    """Return the bytes of every chunk as ``split_body`` reads them."""
    kind = np.dtype("<u2" if chunk <= 1 << 15 else "<u4")
    return torch.from_numpy(sizes.numpy().astype(kind).view(np.uint8))


def _check_symbols(symbols: torch.Tensor) -> None:
    check_instance(symbols, "symbols", torch.Tensor)
    if symbols.dtype != torch.uint8 or symbols.dim() != 1:
        raise DtypeError(f"symbols: {symbols.dtype}, {symbols.dim()} axes; must be a flat uint8 tensor")


def _check_lengths(lengths: torch.Tensor) -> huffman.Lengths:
    check_instance(lengths, "lengths", torch.Tensor)
    if lengths.dtype != torch.uint8 or lengths.dim() != 1 or lengths.numel() > MAX_ALPHABET:
        raise DtypeError(f"lengths: {lengths.dtype}, shape {list(lengths.shape)}; must be uint8 of shape [A], A <= 256")
    return huffman.check_lengths(lengths.cpu().numpy())


def _count_symbols(symbols: torch.Tensor, alphabet: int) -> torch.Tensor:
    counts = torch.zeros(MAX_ALPHABET, dtype=torch.int64, device=symbols.device)
    for part in symbols.split(1 << 20):  # bincount needs eight bytes a symbol
        counts += torch.bincount(part.int(), minlength=MAX_ALPHABET)
    if bool(counts[alphabet:].any()):
        raise ArgumentError(f"symbols: one is {int(counts.nonzero().max())}; the alphabet has {alphabet} symbols")
    return counts[:alphabet]


def _encode(symbols: torch.Tensor, lengths: torch.Tensor, chunk: int, head: bytes) -> torch.Tensor:
    stream = huffman.encode(symbols.cpu().numpy(), lengths.cpu().numpy(), chunk=chunk)
    sizes = join_sizes(torch.from_numpy(stream.sizes.astype(np.int64)), chunk)
    parts = (torch.frombuffer(bytearray(head), dtype=torch.uint8), sizes, torch.from_numpy(stream.payload))
    return torch.cat(parts).to(symbols.device)


def _decode(body: torch.Tensor, lengths: torch.Tensor, chunk: int, count: int) -> torch.Tensor:
    sizes, payload = split_body(body, chunk, count)
    stream = huffman.HuffmanStream(
        count=count, chunk=chunk, sizes=sizes.numpy().astype(np.uint32), payload=payload.cpu().numpy()
    )
    symbols = huffman.decode(stream, lengths.cpu().numpy())
    return torch.from_numpy(symbols.astype(np.uint8)).to(body.device)


def kernels() -> tuple[Kernel, ...]:
    """Return the kernels of this backend."""

    def always(request: Request) -> str | None:
        return None

    table: dict[str, Callable[..., torch.Tensor]] = {
        "count_symbols": _count_symbols,
        "huffman_encode": _encode,
        "huffman_decode": _decode,
    }
    return tuple(Kernel(op, "torch", run, always) for op, run in table.items())
