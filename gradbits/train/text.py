"""Text as bytes: Python's own help topics, or any file."""

from __future__ import annotations

from pathlib import Path

import torch

from gradbits.core.errors import CorruptDataError, MissingDataError
from gradbits.train.datasets import TextData

SMALLEST = 1000  # bytes; the last tenth must hold something to test on


def load_pydoc() -> TextData:
    """Return the help topics of the running Python, about 465 KB of English, sorted by name.

    The topics change with the version of Python, so results are comparable within one version only.
    """
    from pydoc_data.topics import topics  # type: ignore[import-not-found,unused-ignore]

    return split("pydoc", "\n\n".join(topics[name] for name in sorted(topics)).encode())


def load_text(path: Path) -> TextData:
    """Return the bytes of a file.

    Raises:
        MissingDataError: it cannot be read.
        CorruptDataError: it is too short to train and test on.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise MissingDataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(raw) < SMALLEST:
        raise CorruptDataError(f"{path}: is {len(raw)} bytes long; must be at least {SMALLEST}")
    return split("text", raw)


def split(name: str, raw: bytes) -> TextData:
    """Return ``raw`` with its last tenth (rounded down) set aside for the test.

    >>> data = split("text", bytes(range(100)))
    >>> len(data.train), data.test.tolist()
    (90, [90, 91, 92, 93, 94, 95, 96, 97, 98, 99])
    """
    everything = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    cut = len(raw) - len(raw) // 10
    return TextData(name=name, train=everything[:cut], test=everything[cut:])
