"""Entropy coding around a codec: the packed symbols of a payload, coded in fewer bits where that is possible.

The coded bytes are a part of their own name, ``"huffman"`` or ``"zstd"``, in place of ``"codes"``; the name of the part
is what tells the receiver. Where coding would make the payload longer, ``"codes"`` is sent as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from gradbits.core.checks import check_instance, check_integer
from gradbits.core.errors import ArgumentError, CorruptDataError, MissingDependencyError
from gradbits.core.packing import symbol_bytes
from gradbits.kernels.dispatch import Request, run
from gradbits.kernels.huffman import code_lengths, encoded_bits
from gradbits.kernels.huffman_symbols import count_symbols, decode_symbols, encode_symbols
from gradbits.kernels.quantize import Noise
from gradbits.wire.codec import MAX_ELEMENTS, Codec, Payload, State
from gradbits.wire.feedback import ErrorFeedback
from gradbits.wire.wrapper import Wrapper

CODES, HUFFMAN, ZSTD = "codes", "huffman", "zstd"
_LONGEST = 11  # bits of a Huffman code: what is decoded fastest, and 1 in 2048 costs little
_MAX_RATIO = 256  # a coded part that is shorter than this is filled with zeros, so that a receiver's memory is bounded


@dataclass(frozen=True, kw_only=True)
class EntropyCodec(Wrapper):
    """A codec with entropy coding around it; the base of the two.

    Args:
        codec: whose symbols are coded.
    """

    def __post_init__(self) -> None:
        check_instance(self.codec, "codec", Codec)
        if isinstance(self.codec, ErrorFeedback):
            raise ArgumentError(
                f"codec={self.codec!r}: has error feedback, which belongs around entropy coding: "
                "ErrorFeedback(codec=Huffman(codec=...))"
            )
        if isinstance(self.codec, EntropyCodec) or not self.codec.has_codes:
            raise ArgumentError(f"codec={self.codec!r}: has no symbols at a fixed width that could be coded")

    @property
    def wants_feedback(self) -> bool:
        return self.codec.wants_feedback

    @property
    def has_codes(self) -> bool:
        return False

    def encode(self, x: torch.Tensor, key: Noise = None, state: State | None = None) -> Payload:
        return self.compress(self.codec.encode(x, key, state))

    def decode(self, payload: Payload) -> torch.Tensor:
        return self.codec.decode(plain(payload))

    def decode_into(self, payload: Payload, out: torch.Tensor, *, add: bool = False) -> None:
        self.codec.decode_into(plain(payload), out, add=add)

    def compress(self, payload: Payload) -> Payload:
        """Return ``payload`` with its codes coded, or as it is where that would be longer."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Huffman(EntropyCodec):
    r"""Canonical Huffman coding of the symbols, :math:`H \le \text{bits per symbol} < H + 1` with their entropy H.

    The code is made from the symbols of each payload and travels with it, half a byte or less per level. Chunks of 8192
    symbols begin on a byte, so that they are decoded in parallel. Known as gradient quantization with Huffman
    coding (GQH) in the survey literature.

    Args:
        codec: whose symbols are coded.

    References:
        Han et al., Deep Compression, ICLR 2016, arXiv:1510.00149; Huffman, A Method for the Construction of
        Minimum-Redundancy Codes, 1952.

    >>> from gradbits.wire.methods.qsgd import QSGD
    >>> codec = Huffman(codec=QSGD(bits=4, bucket=4096))
    >>> _ = torch.manual_seed(0)
    >>> payload = codec.encode(torch.randn(65536))
    >>> sorted(payload.parts), round(payload.bits_per_element, 1)
    (['grid', 'huffman', 'norms'], 1.1)
    """

    def compress(self, payload: Payload) -> Payload:
        codes, count = payload.parts[CODES], payload.numel
        if not count:
            return payload
        symbols = run("unpack_symbols", Request(codes.device.type), "auto", codes, payload.bits, count)
        counts = count_symbols(symbols, 1 << payload.bits).cpu().numpy()
        lengths = code_lengths(counts, limit=_LONGEST)
        if encoded_bits(counts, lengths) >= 8 * codes.numel():
            return payload
        coded = encode_symbols(symbols, torch.from_numpy(lengths))
        return _replaced(payload, CODES, HUFFMAN, coded) if coded.numel() < codes.numel() else payload


@dataclass(frozen=True, kw_only=True)
class Zstd(EntropyCodec):
    """Zstandard on the packed symbols; finds repeated stretches too, so it is the one for sparse gradients.

    Args:
        codec: whose symbols are coded.
        level: of the compression, 1 (fastest) to 19.

    Raises:
        MissingDependencyError: the package ``zstandard`` is not installed.

    >>> from gradbits.wire.methods.qsgd import QSGD
    >>> Zstd(codec=QSGD()).encode(torch.zeros(100_000)).nbytes < 2000
    True
    """

    level: int = 1

    def __post_init__(self) -> None:
        EntropyCodec.__post_init__(self)
        check_integer(self.level, "level", 1, 19)
        _zstandard()

    def compress(self, payload: Payload) -> Payload:
        codes = payload.parts[CODES]
        blob = _zstandard().ZstdCompressor(level=self.level).compress(codes.cpu().numpy().data)
        blob += bytes(max(0, -(-codes.numel() // _MAX_RATIO) - len(blob)))
        return _replaced(payload, CODES, ZSTD, _as_tensor(blob)) if len(blob) < codes.numel() else payload


def plain(payload: Payload) -> Payload:
    """Return ``payload`` with its symbols at their fixed width, whatever they were coded with.

    Raises:
        CorruptDataError: the coded part is damaged, or does not hold as many symbols as the payload has elements.
        MissingDependencyError: coded with Zstandard, and the package ``zstandard`` is not installed.
    """
    check_instance(payload, "payload", Payload)
    coded = [name for name in (CODES, HUFFMAN, ZSTD) if name in payload.parts]
    if coded in ([], [CODES]):
        return payload
    blob = payload.parts[coded[0]]
    if len(coded) > 1 or blob.dtype != torch.uint8 or blob.dim() != 1 or not 1 <= payload.bits <= 8:
        raise CorruptDataError(f"payload: parts {', '.join(coded)} of {blob.dtype} do not fit together")
    if payload.numel > MAX_ELEMENTS:
        raise CorruptDataError(f"payload: shape {list(payload.shape)} is not possible")
    if coded[0] == ZSTD:
        return _replaced(payload, ZSTD, CODES, _unzstd(blob, symbol_bytes(payload.bits, payload.numel)))
    symbols = decode_symbols(blob, max_symbols=payload.numel)
    if symbols.numel() != payload.numel:
        raise CorruptDataError(f"payload: {symbols.numel()} Huffman symbols for {payload.numel} elements")
    if symbols.numel() and int(symbols.max()) >= 1 << payload.bits:
        raise CorruptDataError(f"payload: a Huffman symbol is {int(symbols.max())}; symbols have {payload.bits} bits")
    packed = run("pack_symbols", Request(blob.device.type), "auto", symbols, payload.bits)
    return _replaced(payload, HUFFMAN, CODES, packed)


def _replaced(payload: Payload, old: str, new: str, data: torch.Tensor) -> Payload:
    kept = {name: part for name, part in payload.parts.items() if name != old}
    return replace(payload, parts={**kept, new: data.to(payload.parts[old].device)})


def _unzstd(blob: torch.Tensor, size: int) -> torch.Tensor:
    zstd, data = _zstandard(), blob.cpu().numpy().data
    if size > len(data) * _MAX_RATIO:
        raise CorruptDataError(f"payload: {size} bytes of codes claimed in {len(data)} bytes of Zstandard")
    try:
        declared = zstd.frame_content_size(bytes(data[:18]))  # as long as a frame's head can be
        codes = zstd.ZstdDecompressor().decompress(data, allow_extra_data=True) if declared == size else b""
    except zstd.ZstdError as error:
        raise CorruptDataError(f"payload: Zstandard data is damaged: {error}") from None
    if len(codes) != size:
        raise CorruptDataError(f"payload: Zstandard data of {declared} bytes; must be {size} bytes of codes")
    return _as_tensor(codes)


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise MissingDependencyError("Zstd needs the package zstandard: pip install 'gradbits[zstd]'") from None
    return zstandard
