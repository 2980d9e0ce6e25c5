"""The frame of a gbz file: prefix, JSON header, one section of bytes per tensor; specified in docs/gbz-format.md."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gradbits.core.errors import CorruptDataError
from gradbits.storage.dtypes import DTYPES, SHAREABLE, byte_size

MAGIC = b"\x89GBZ\r\n\x1a\n"
VERSION = 1
PREFIX = struct.Struct("<8sHHIQ8s")  # magic, version, flags, header bytes, file bytes, checksum of prefix and header
METADATA = "__metadata__"
ALIGNMENT = 8
MAX_HEADER = 1 << 26
MAX_DIMS = 64
MAX_SIZE = 1 << 62
MAX_EXPANSION = 1024  # a tensor is at most this many times its section ...
FREE_EXPANSION = 1 << 16  # ... plus this many bytes, so that memory is bounded by the file

CODINGS = ("raw", "shared", "planes", "zstd", "alias")
INDEXES = ("dense", "bitmap", *(f"gap{bits}" for bits in range(3, 9)))


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor as the header describes it.

    Attributes:
        dtype, shape: as in safetensors.
        coding: ``raw``, ``shared``, ``planes``, ``zstd`` or ``alias``.
        begin, end: the section's place, in bytes from the end of the header.
        sum: checksum of the section, 16 hexadecimal digits.
        extra: what the coding adds: ``k``, ``nnz``, ``index`` and ``loss`` for ``shared``, ``of`` for ``alias``,
            ``why`` (optional) for ``raw``.
    """

    dtype: str
    shape: tuple[int, ...]
    coding: str
    begin: int
    end: int
    sum: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in memory."""
        return byte_size(self.dtype, self.shape)

    @property
    def stored(self) -> int:
        """Bytes of the section."""
        return self.end - self.begin


def checksum(*parts: bytes | memoryview) -> bytes:
    """Return the first 8 bytes BLAKE2b gives when told to give 8.

    >>> checksum(b"a", b"b") == checksum(b"ab"), len(checksum())
    (True, 8)
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.digest()


def expands_too_much(nbytes: int, stored: int) -> bool:
    """Return whether a tensor of ``nbytes`` may not come from a section of ``stored`` bytes."""
    return nbytes > MAX_EXPANSION * stored + FREE_EXPANSION


def dump_head(entries: Mapping[str, Entry], metadata: Mapping[str, str], body: int) -> bytes:
    """Return prefix and header for sections that fill ``body`` bytes."""
    tree: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    for name, entry in entries.items():
        tree[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "coding": entry.coding,
            "offsets": [entry.begin, entry.end],
            "sum": entry.sum,
            **entry.extra,
        }
    header = json.dumps(tree, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    header += b" " * (-(PREFIX.size + len(header)) % ALIGNMENT)
    total = PREFIX.size + len(header) + body
    bare = PREFIX.pack(MAGIC, VERSION, 0, len(header), total, b"\0" * 8)
    return PREFIX.pack(MAGIC, VERSION, 0, len(header), total, checksum(bare, header)) + header


def parse_prefix(data: bytes, file_size: int) -> tuple[int, bytes]:
    """Return (header bytes, checksum) from the first bytes of a file of ``file_size`` bytes.

    Raises:
        CorruptDataError: not a gbz file, of another version, or not of the length it had when it was written.
    """
    if len(data) < PREFIX.size:
        raise CorruptDataError(f"not a gbz file: {len(data)} bytes, a prefix alone has {PREFIX.size}")
    magic, version, flags, header, total, digest = PREFIX.unpack(data[: PREFIX.size])
    if magic != MAGIC:
        raise CorruptDataError(f"not a gbz file: it begins with {magic!r}, a gbz file with {MAGIC!r}")
    if version != VERSION or flags:
        raise CorruptDataError(f"gbz version {version}, flags {flags}: this reader knows version {VERSION}, flags 0")
    if total != file_size:
        raise CorruptDataError(f"gbz file of {file_size} bytes, written with {total}: cut short or added to")
    if header > MAX_HEADER or PREFIX.size + header > file_size or (PREFIX.size + header) % ALIGNMENT:
        raise CorruptDataError(f"gbz header of {header} bytes in a file of {file_size} bytes")
    return header, digest


def parse_header(prefix: bytes, header: bytes, digest: bytes, body: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return (entries, metadata), every field checked: sections fill ``body`` without overlap, sizes are plausible.

    Raises:
        CorruptDataError: checksum, JSON, a field or the layout of the sections is wrong.
    """
    if checksum(prefix[: PREFIX.size - 8] + b"\0" * 8, header) != digest:
        raise CorruptDataError("gbz header: checksum does not match")
    try:
        tree = json.loads(header.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except CorruptDataError:
        raise
    except (ValueError, RecursionError) as error:
        raise CorruptDataError(f"gbz header: not JSON that this format allows ({type(error).__name__})") from error
    if not isinstance(tree, dict):
        raise CorruptDataError("gbz header: must be a JSON object")
    metadata = tree.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptDataError(f"gbz header: {METADATA} must map strings to strings")
    entries = {name: _entry(name, value) for name, value in tree.items()}
    _check_sections(entries, body)
    _check_aliases(entries)
    total = sum(entry.nbytes for entry in entries.values())  # aliases included: they cost little and can be many
    if total > MAX_EXPANSION * (body + len(header)) + FREE_EXPANSION * len(entries):
        raise CorruptDataError(f"gbz header: {total} bytes of tensors claimed from a file of {body + len(header)}")
    return entries, metadata


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        raise CorruptDataError("gbz header: a key occurs twice")
    for text in (one for pair in pairs for one in pair if isinstance(one, str)):
        text.encode()  # a lone surrogate is a ValueError
    return tree


def _no_constants(text: str) -> None:
    raise CorruptDataError(f"gbz header: {text} is not a JSON number")


def _entry(name: str, value: Any) -> Entry:
    where = f"gbz header, tensor {name[:80]!r}"
    if not isinstance(value, dict):
        raise CorruptDataError(f"{where}: must be a JSON object")
    fields = dict(value)
    dtype, coding = fields.pop("dtype", None), fields.pop("coding", None)
    shape, offsets, digest = fields.pop("shape", None), fields.pop("offsets", None), fields.pop("sum", None)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CorruptDataError(f"{where}: dtype must be one of {', '.join(DTYPES)}")
    if coding not in CODINGS:
        raise CorruptDataError(f"{where}: coding must be one of {', '.join(CODINGS)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_is_size(size) for size in shape):
        raise CorruptDataError(f"{where}: shape must be at most {MAX_DIMS} numbers of at least 0")
    # the product is looked at with its zeros taken out: safe to multiply anywhere, in any order
    if byte_size(dtype, tuple(size for size in shape if size)) > MAX_SIZE:
        raise CorruptDataError(f"{where}: shape is larger than any memory")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(place) for place in offsets):
        raise CorruptDataError(f"{where}: offsets must be two numbers of at least 0")
    if not isinstance(digest, str) or len(digest) != 16 or any(digit not in "0123456789abcdef" for digit in digest):
        raise CorruptDataError(f"{where}: sum must be 16 hexadecimal digits")
    entry = Entry(
        dtype=dtype, shape=tuple(shape), coding=coding, begin=offsets[0], end=offsets[1], sum=digest, extra=fields
    )
    _check_extra(where, entry)
    return entry


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SIZE


def _is_loss(value: Any) -> bool:
    numbers = isinstance(value, list) and len(value) == 2
    return numbers and all(isinstance(one, (int, float)) and not isinstance(one, bool) and one >= 0 for one in value)


def _check_extra(where: str, entry: Entry) -> None:
    legal: dict[str, Any] = {
        "raw": {"why": lambda value: isinstance(value, str)},
        "shared": {
            "k": lambda value: _is_size(value) and value < 1 << 12,
            "nnz": lambda value: _is_size(value) and value * DTYPES[entry.dtype].itemsize <= entry.nbytes,
            "index": lambda value: value in INDEXES,
            "loss": _is_loss,
        },
        "alias": {"of": lambda value: isinstance(value, str)},
    }.get(entry.coding, {})
    optional = {"why"}
    for key, value in entry.extra.items():
        if key not in legal or not legal[key](value):
            raise CorruptDataError(f"{where}: {key[:40]!r} does not belong to coding {entry.coding!r} or is not legal")
    missing = [key for key in legal if key not in entry.extra and key not in optional]
    if missing:
        raise CorruptDataError(f"{where}: coding {entry.coding!r} needs {', '.join(missing)}")
    if entry.coding == "shared" and entry.dtype not in SHAREABLE:
        raise CorruptDataError(f"{where}: weights of dtype {entry.dtype} cannot be shared")
    if entry.coding == "raw" and entry.stored != entry.nbytes:
        raise CorruptDataError(f"{where}: {entry.stored} bytes stored as they are, {entry.nbytes} needed")
    if entry.coding != "alias" and expands_too_much(entry.nbytes, entry.stored):
        raise CorruptDataError(f"{where}: {entry.nbytes} bytes claimed from a section of {entry.stored}")


def _check_sections(entries: Mapping[str, Entry], body: int) -> None:
    place = 0
    for name, entry in entries.items():
        aligned = -(-place // ALIGNMENT) * ALIGNMENT
        if entry.begin != aligned or entry.end < entry.begin:
            raise CorruptDataError(
                f"gbz header, tensor {name[:80]!r}: section {entry.begin} to {entry.end} does not follow the one before"
            )
        place = entry.end
    if -(-place // ALIGNMENT) * ALIGNMENT != body:
        raise CorruptDataError(f"gbz header: sections end at {place}, the file has {body} bytes for them")


def _check_aliases(entries: Mapping[str, Entry]) -> None:
    for name, entry in entries.items():
        if entry.coding == "alias":
            target = entries.get(entry.extra["of"])
            if target is None or target.coding == "alias" or (target.dtype, target.shape) != (entry.dtype, entry.shape):
                raise CorruptDataError(f"gbz header, tensor {name[:80]!r}: is an alias of no tensor of its kind")
            if entry.stored:
                raise CorruptDataError(f"gbz header, tensor {name[:80]!r}: an alias has no section of its own")
