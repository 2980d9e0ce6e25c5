"""Reading gbz files: memory-mapped, one tensor at a time or all in parallel; every byte is checked before its use."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from gradbits.core.errors import ArgumentError, CorruptDataError, MissingDataError
from gradbits.storage.dtypes import DTYPES, from_bytes
from gradbits.storage.layout import ALIGNMENT, PREFIX, Entry, checksum, parse_header, parse_prefix
from gradbits.storage.lossless import decode_planes, decode_zstd
from gradbits.storage.shared_section import decode_shared


class GbzFile:
    """An open gbz file; the header is checked when it is opened, a tensor's bytes when the tensor is read.

    Memory stays in proportion to the file: a header that claims more than 1024 times what is there is refused.

    Args:
        path: the file.
        max_bytes: refuse a file whose tensors take more than this in memory; None for no limit of its own.

    Raises:
        MissingDataError: there is no such file.
        CorruptDataError: not a gbz file, or damaged.

    >>> import tempfile
    >>> from gradbits.storage import save_compressed
    >>> path = Path(tempfile.mkdtemp()) / "one.gbz"
    >>> _ = save_compressed({"w": torch.eye(64)}, path)
    >>> with GbzFile(path) as file:
    ...     file.names(), bool((file.tensor("w") == torch.eye(64)).all())
    (['w'], True)
    """

    def __init__(self, path: str | Path, *, max_bytes: int | None = None) -> None:
        self.path = Path(path)
        self._map = _open(self.path)
        try:
            prefix = self._map[: PREFIX.size]
            header_size, digest = parse_prefix(prefix, len(self._map))
            self._body = PREFIX.size + header_size
            self.entries: Mapping[str, Entry]
            self.metadata: Mapping[str, str]
            self.entries, self.metadata = parse_header(
                prefix, self._map[PREFIX.size : self._body], digest, len(self._map) - self._body
            )
            total = sum(entry.nbytes for entry in self.entries.values())
            if max_bytes is not None and total > max_bytes:
                raise CorruptDataError(f"{total} bytes of tensors, more than the {max_bytes} bytes that are allowed")
        except CorruptDataError as error:
            self.close()
            raise CorruptDataError(f"{self.path}: {error}") from error

    def __enter__(self) -> GbzFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the mapping; tensors that were read stay valid."""
        with suppress(BufferError):  # a view lives on in the traceback of an error: the mapping goes when it does
            self._map.close()

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self._map)

    def names(self) -> list[str]:
        """Return the names of the tensors in the order in which they are stored."""
        return list(self.entries)

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor; only its own bytes are read, checked and decoded.

        Raises:
            ArgumentError: no tensor of this name.
            CorruptDataError: its bytes are damaged.
        """
        entry = self.entries.get(name)
        if entry is None:
            some = ", ".join(self.names()[:8])
            raise ArgumentError(f"{self.path}: has no tensor {name!r}; it has {some or 'none'}")
        if entry.coding == "alias":
            return self.tensor(entry.extra["of"])
        try:
            with memoryview(self._map) as whole, whole[self._body + entry.begin : self._body + entry.end] as section:
                self._check(entry, section)
                return _decode(entry, section)
        except CorruptDataError as error:
            raise CorruptDataError(f"{self.path}: tensor {name!r}: {error}") from error

    def items(
        self, *, workers: int = 1, progress: Callable[[str, int], None] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) in order, decoded by ``workers`` threads; aliases share the memory of what they name.

        Args:
            workers: threads, at least 1.
            progress: called with the name and the bytes of each tensor when it is ready.

        Raises:
            CorruptDataError: a tensor is damaged.
        """
        own = [name for name, entry in self.entries.items() if entry.coding != "alias"]
        wanted = {entry.extra["of"] for entry in self.entries.values() if entry.coding == "alias"}
        kept: dict[str, torch.Tensor] = {}
        with ThreadPoolExecutor(max(1, workers)) as pool:
            # no more than two tensors per thread wait to be taken, so that memory stays bounded
            ahead = max(1, workers) * 2
            futures = {name: pool.submit(self.tensor, name) for name in own[:ahead]}
            try:
                for number, name in enumerate(own):
                    tensor = futures.pop(name).result()
                    if number + ahead < len(own):
                        futures[own[number + ahead]] = pool.submit(self.tensor, own[number + ahead])
                    if name in wanted:
                        kept[name] = tensor
                    if progress is not None:
                        progress(name, self.entries[name].nbytes)
                    yield name, tensor
            finally:
                for future in futures.values():
                    future.cancel()
        for name, entry in self.entries.items():
            if entry.coding == "alias":
                yield name, kept[entry.extra["of"]]

    def tensors(
        self, *, workers: int = 1, progress: Callable[[str, int], None] | None = None
    ) -> dict[str, torch.Tensor]:
        """Return all tensors by name, in the order of the file."""
        found = dict(self.items(workers=workers, progress=progress))
        return {name: found[name] for name in self.entries}

    def _check(self, entry: Entry, section: memoryview) -> None:
        if checksum(section).hex() != entry.sum:
            raise CorruptDataError("checksum does not match")
        padding = self._map[self._body + entry.end : self._body + entry.end + (-entry.end % ALIGNMENT)]
        if any(padding):
            raise CorruptDataError("bytes after the section are not zero")


def _open(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < PREFIX.size:
                raise CorruptDataError(f"{path}: not a gbz file: {size} bytes, a prefix alone has {PREFIX.size}")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise MissingDataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _decode(entry: Entry, section: memoryview) -> torch.Tensor:
    if entry.coding == "shared":
        return decode_shared(section, entry)
    if entry.coding == "raw":
        return from_bytes(np.frombuffer(section, np.uint8).copy(), entry.dtype, entry.shape)
    width = DTYPES[entry.dtype].itemsize
    decode = decode_planes if entry.coding == "planes" else decode_zstd
    return from_bytes(decode(section, entry.nbytes, width), entry.dtype, entry.shape)
