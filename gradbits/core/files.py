"""Files that are either written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from gradbits.core.errors import GradbitsError


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call ``write`` with a temporary file in the folder of ``path``, then move it to ``path`` in one step.

    A reader sees the old file or the new one, never a part; whatever goes wrong, the temporary file is removed.

    Args:
        path: the file to make; its folder is made where it is missing.
        write: gets a binary file open for writing.

    Raises:
        GradbitsError: the file could not be written; names it and says why.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "note.txt"
    >>> write_atomically(target, lambda file: file.write(b"whole"))
    >>> target.read_bytes()
    b'whole'
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise GradbitsError(f"{path}: cannot be written: {error.strerror or error}") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        os.replace(name, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(name)
        if isinstance(error, OSError):
            raise GradbitsError(f"{path}: cannot be written: {error.strerror or error}") from error
        raise


def _umask() -> int:
    # there is no call that reads the mask without setting it
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
