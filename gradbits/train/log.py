"""The log of a run: one JSON object a line, flushed line by line, cut back to the checkpoint when a run is resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from gradbits.core.errors import CorruptDataError, GradbitsError


class Log:
    """Appends lines to a file.

    Args:
        path: the file.
        keep: bytes of an existing file to keep; what follows was written after the checkpoint and comes again.
        common: values that every line begins with.

    Raises:
        CorruptDataError: the file is shorter than ``keep``.
        GradbitsError: it cannot be opened.
    """

    def __init__(self, path: Path, *, keep: int = 0, common: dict[str, Any] | None = None) -> None:
        self.path, self.common = path, common or {}
        try:
            size = path.stat().st_size if path.exists() else 0
            if size < keep:
                raise CorruptDataError(f"{path}: is {size} bytes long; the checkpoint was made when it had {keep}")
            self._file = path.open("ab")
            self._file.truncate(keep)
        except OSError as error:
            raise GradbitsError(f"{path}: cannot be written: {error.strerror or error}") from error

    def write(self, **values: Any) -> None:
        """Append one line; a number that is not finite becomes ``null``, for which JSON has a word."""
        line = {key: _finite(value) for key, value in {**self.common, **values}.items()}
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def size(self) -> int:
        """Return the length of the file in bytes."""
        return self._file.seek(0, 2)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NoLog(Log):
    """A log that keeps nothing, for the ranks beside rank 0."""

    def __init__(self) -> None:
        self.common = {}

    def write(self, **values: Any) -> None:
        """Do nothing."""

    def size(self) -> int:
        """Return 0."""
        return 0

    def close(self) -> None:
        """Do nothing."""


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log.

    Raises:
        CorruptDataError: a line is not a JSON object; names it.
    """
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise CorruptDataError(f"{path}: line {number} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise CorruptDataError(f"{path}: line {number} is not a JSON object")
        lines.append(value)
    return lines
