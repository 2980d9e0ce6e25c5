"""Frames: a payload as one self-describing string of bytes, see docs/wire-format.md.

The decoder is total: any bytes give a payload or a typed error, and no count in them is believed before the bytes that
it claims are there, so memory is bounded by the size of the input.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
import torch

from gradbits.core.checks import check_instance
from gradbits.core.errors import ArgumentError, CorruptDataError, DtypeError
from gradbits.wire.codec import MAX_ELEMENTS, Payload

MAGIC = b"GBWF"
VERSION = 1
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int32, torch.int64)
MAX_DIMS = 64
MAX_PARTS = 16

_HEAD = struct.Struct("<4sBBBBIBBHQ")  # magic, version, dtype, bits, dims, bucket, parts, name length, zero, length
_PART = struct.Struct("<BBHIQ")  # name length, dtype, zero, zero, elements
_CRC = struct.Struct("<I")
_ALIGN = 8


def to_frame(payload: Payload) -> torch.Tensor:
    """Return ``payload`` as a flat uint8 tensor on the device of its parts.

    Raises:
        DtypeError: not a payload, or a part of a dtype that frames do not hold.
        ArgumentError: more parts or axes than a frame holds, or a name longer than 255 bytes.

    >>> payload = Payload(codec="none", shape=torch.Size([2]), dtype=torch.float32, parts={"x": torch.ones(2)})
    >>> frame = to_frame(payload)
    >>> frame.numel(), from_frame(frame).parts["x"].tolist()
    (68, [1.0, 1.0])
    """
    check_instance(payload, "payload", Payload)
    if len(payload.shape) > MAX_DIMS or len(payload.parts) > MAX_PARTS:
        raise ArgumentError(f"payload: {len(payload.shape)} axes and {len(payload.parts)} parts are too many")
    if not 0 <= payload.bits <= 8 or not 0 <= payload.bucket < 1 << 32:
        raise ArgumentError(
            f"payload: bits={payload.bits}, bucket={payload.bucket}: must be 0 to 8, and below 2^32"
        )
    name = _name(payload.codec)
    table, body = [], []
    device = torch.device("cpu")
    for part, values in payload.parts.items():
        label = _name(part)
        table.append(_PART.pack(len(label), _dtype(values.dtype), 0, 0, values.numel()) + label)
        raw = values.detach().reshape(-1).contiguous().view(torch.uint8)
        body += [raw.cpu(), torch.zeros(-raw.numel() % _ALIGN, dtype=torch.uint8)]
        device = values.device
    head = struct.pack(f"<{len(payload.shape)}Q", *payload.shape) + name + b"".join(table)
    head += bytes(-(_HEAD.size + len(head)) % _ALIGN)
    length = _HEAD.size + len(head) + sum(b.numel() for b in body) + _CRC.size
    fixed = _HEAD.pack(
        MAGIC, VERSION, _dtype(payload.dtype), payload.bits, len(payload.shape), payload.bucket, len(payload.parts),
        len(name), 0, length,
    )  # fmt: skip
    frame = torch.cat([_bytes(fixed + head), *body, torch.zeros(_CRC.size, dtype=torch.uint8)])
    data = frame.numpy()
    data[-_CRC.size :] = np.frombuffer(_CRC.pack(zlib.crc32(data.data[: -_CRC.size])), np.uint8)
    return frame.to(device)


def from_frame(data: torch.Tensor | bytes | bytearray | memoryview) -> Payload:
    """Return the payload of a frame; its parts are views of ``data`` where that is possible.

    Args:
        data: a whole frame and nothing else; a flat uint8 tensor or bytes.

    Raises:
        CorruptDataError: not a frame, of another version, cut short, too long, or changed on the way.
        DtypeError: ``data`` is neither bytes nor a uint8 tensor.

    >>> from_frame(b"GBWF")
    Traceback (most recent call last):
    gradbits.core.errors.CorruptDataError: frame: 4 bytes are too few for a frame
    """
    raw = _as_tensor(data)
    device = raw.device
    raw = raw.cpu()
    view = raw.numpy().data
    if len(view) < _HEAD.size + _CRC.size:
        raise CorruptDataError(f"frame: {len(view)} bytes are too few for a frame")
    magic, version, dtype, bits, dims, bucket, parts, name_size, zero, length = _HEAD.unpack_from(view)
    if magic != MAGIC:
        raise CorruptDataError(f"frame: begins with {magic.hex()}; a frame begins with {MAGIC.hex()}")
    if version != VERSION:
        raise CorruptDataError(f"frame: version {version}; this program reads version {VERSION}")
    if length != len(view):
        raise CorruptDataError(f"frame: {length} bytes claimed, {len(view)} found")
    if _CRC.unpack_from(view, length - _CRC.size)[0] != zlib.crc32(view[: -_CRC.size]):
        raise CorruptDataError("frame: checksum does not match")
    if dims > MAX_DIMS or parts > MAX_PARTS or bits > 8 or zero:
        raise CorruptDataError(f"frame: {dims} axes, {parts} parts, {bits} bits are not possible")
    reader = _Reader(view[: -_CRC.size], _HEAD.size)
    shape = struct.unpack(f"<{dims}Q", reader.take(8 * dims))
    extent = 1
    for size in shape:
        extent *= max(size, 1)
    if extent > MAX_ELEMENTS:
        raise CorruptDataError(f"frame: shape {list(shape)} is not possible")
    codec = reader.text(name_size)
    table = []
    for _ in range(parts):
        label_size, kind, zero, more, count = _PART.unpack(reader.take(_PART.size))
        if zero or more:
            raise CorruptDataError("frame: a reserved field is not zero")
        table.append((reader.text(label_size), _torch_dtype(kind), count))
    reader.align()
    found = {}
    for label, kind, count in table:
        start, size = reader.at, count * kind.itemsize
        reader.take(size)
        if label in found:
            raise CorruptDataError(f"frame: part {label!r} occurs twice")
        found[label] = _values(raw[start : start + size], kind).to(device)
        reader.align()
    if reader.at != length - _CRC.size:
        raise CorruptDataError(f"frame: {length - _CRC.size - reader.at} bytes are left over")
    return Payload(
        codec=codec, shape=torch.Size(shape), dtype=_torch_dtype(dtype), bits=bits, bucket=bucket, parts=found
    )


class _Reader:
    """A position in the bytes of a frame that never moves past their end."""

    def __init__(self, view: memoryview, at: int) -> None:
        self.view, self.at = view, at

    def take(self, size: int) -> memoryview:
        """Return the next ``size`` bytes."""
        if size > len(self.view) - self.at:
            raise CorruptDataError(f"frame: {size} bytes claimed, {len(self.view) - self.at} are left")
        self.at += size
        return self.view[self.at - size : self.at]

    def text(self, size: int) -> str:
        """Return the next ``size`` bytes as ASCII."""
        try:
            return str(bytes(self.take(size)), "ascii")
        except UnicodeDecodeError:
            raise CorruptDataError("frame: a name is not ASCII") from None

    def align(self) -> None:
        """Move to the next multiple of 8; what is skipped must be zero."""
        if any(self.take(-self.at % _ALIGN)):
            raise CorruptDataError("frame: padding is not zero")


def _as_tensor(data: torch.Tensor | bytes | bytearray | memoryview) -> torch.Tensor:
    if isinstance(data, torch.Tensor):
        if data.dtype != torch.uint8 or data.dim() != 1:
            raise DtypeError(f"data: {data.dtype} of {data.dim()} axes; must be flat torch.uint8")
        return data.contiguous()
    check_instance(data, "data", bytes, bytearray, memoryview)
    return _bytes(bytes(data))


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


def _values(raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if (raw.data_ptr() % dtype.itemsize) or raw.storage_offset() % dtype.itemsize:
        raw = raw.clone()  # a frame inside a larger buffer may lie at any address
    return raw.view(dtype)


def _name(text: str) -> bytes:
    if not text.isascii() or len(text) > 255:
        raise ArgumentError(f"payload: name {text[:40]!r} must be at most 255 ASCII characters")
    return text.encode()


def _dtype(dtype: torch.dtype) -> int:
    if dtype not in DTYPES:
        raise DtypeError(f"payload: dtype {dtype} is not supported; use one of {', '.join(map(str, DTYPES))}")
    return DTYPES.index(dtype)


def _torch_dtype(index: int) -> torch.dtype:
    if index >= len(DTYPES):
        raise CorruptDataError(f"frame: dtype number {index} is not known")
    return DTYPES[index]
