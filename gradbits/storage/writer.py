"""Writing gbz files: sections are collected, then the whole file appears at once or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from gradbits.core.errors import ArgumentError
from gradbits.core.files import write_atomically
from gradbits.storage.layout import ALIGNMENT, MAX_HEADER, METADATA, Entry, checksum, dump_head


@dataclass(frozen=True, kw_only=True)
class Section:
    """One tensor ready to be written: what the header says of it, and its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    coding: str
    data: bytes | memoryview
    extra: Mapping[str, Any] = field(default_factory=dict)


def write_gbz(path: str | Path, sections: Sequence[Section], metadata: Mapping[str, str] | None = None) -> int:
    """Write a gbz file and return its size in bytes; a reader sees the old file or the whole new one, never a part.

    Args:
        path: the file to make.
        sections: tensors in the order in which they are to be stored.
        metadata: strings by name, kept as they are.

    Raises:
        ArgumentError: a name twice, a name or metadata that JSON cannot hold, too many tensors.
        GradbitsError: the file cannot be written.
    """
    head, body = build_head(sections, metadata)

    def write(file: BinaryIO) -> None:
        file.write(head)
        for section in sections:
            file.write(section.data)
            file.write(bytes(-len(section.data) % ALIGNMENT))

    write_atomically(Path(path), write)
    return len(head) + body


def build_head(sections: Sequence[Section], metadata: Mapping[str, str] | None = None) -> tuple[bytes, int]:
    """Return (prefix and header, bytes that the sections fill after them): together the size of the file.

    Raises:
        ArgumentError: a name twice, a name or metadata that JSON cannot hold, too many tensors.
    """
    entries: dict[str, Entry] = {}
    place = 0
    for section in sections:
        if section.name in entries or section.name == METADATA:
            raise ArgumentError(f"tensor name {section.name!r}: used twice, or kept for the metadata")
        size = len(section.data)
        entries[section.name] = Entry(
            dtype=section.dtype,
            shape=section.shape,
            coding=section.coding,
            begin=place,
            end=place + size,
            sum=checksum(section.data).hex(),
            extra=section.extra,
        )
        place += size + (-size % ALIGNMENT)
    try:
        head = dump_head(entries, _checked(metadata or {}), place)
    except ValueError as error:
        raise ArgumentError(f"tensor names and metadata: must be text that JSON can hold ({error})") from error
    if len(head) > MAX_HEADER:
        raise ArgumentError(f"header of {len(head)} bytes: names and metadata may fill {MAX_HEADER} bytes")
    return head, place


def _checked(metadata: Mapping[str, str]) -> Mapping[str, str]:
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ArgumentError(f"metadata {key!r}: {value!r}: names and values must be strings")
    return metadata
