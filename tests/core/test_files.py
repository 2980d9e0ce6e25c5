"""Files are written whole or not at all."""

from __future__ import annotations

import pytest

from gradbits.core.errors import GradbitsError
from gradbits.core.files import write_atomically


def test_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "deeper" / "a.bin"
    write_atomically(path, lambda file: file.write(b"one"))
    write_atomically(path, lambda file: file.write(b"two"))
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_a_failure_keeps_the_old_file(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(GradbitsError, match=r"file/a\.bin: cannot be written"):
        write_atomically(tmp_path / "file" / "a.bin", lambda file: file.write(b"x"))


def test_permissions_are_those_of_an_ordinary_file(tmp_path):
    ordinary = tmp_path / "ordinary"
    ordinary.write_bytes(b"")
    write_atomically(tmp_path / "a.bin", lambda file: file.write(b"x"))
    assert (tmp_path / "a.bin").stat().st_mode == ordinary.stat().st_mode
