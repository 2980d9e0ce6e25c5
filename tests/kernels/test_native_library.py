"""Why the native library is not there, where it is not."""

from __future__ import annotations

import pytest

from gradbits.core.errors import ArgumentError
from gradbits.kernels.dispatch import Request
from gradbits.kernels.native import describe, kernels, library


@pytest.fixture
def fresh():
    """Forget the library that was found, before and after."""
    library.library.cache_clear()
    yield
    library.library.cache_clear()


def test_a_missing_library_is_a_reason_not_an_error(tmp_path):
    """As after an install without a compiler."""
    assert "compiler" in str(library.load(tmp_path / "_native.so"))


def test_a_file_that_is_no_library_is_refused(tmp_path):
    """A damaged file."""
    (tmp_path / "_native.so").write_bytes(b"nonsense")
    assert "does not load" in str(library.load(tmp_path / "_native.so"))


def test_a_library_of_other_sources_is_refused(native_level, monkeypatch):
    """Calling a stale library could do anything."""
    path = library.HERE / "_native.so"
    assert isinstance(library.load(path), library.Library)
    monkeypatch.setattr(library, "source_stamp", lambda: "0123456789abcdef")
    assert "other sources" in str(library.load(path))


def test_the_switch_turns_every_kernel_off(fresh, monkeypatch):
    """Each says so."""
    monkeypatch.setenv(library.SWITCH, "0")
    assert {kernel.why_not(Request("cpu")) for kernel in kernels()} == {"switched off by GRADBITS_NATIVE=0"}
    assert describe() == "none: switched off by GRADBITS_NATIVE=0"


def test_the_switch_holds_to_an_instruction_set(native_level, fresh, monkeypatch):
    """The portable path exists everywhere."""
    monkeypatch.setenv(library.SWITCH, "portable")
    assert library.library().name == "portable"


def test_an_unknown_switch_is_an_error(fresh, monkeypatch):
    """It names what is legal."""
    monkeypatch.setenv(library.SWITCH, "sse9")
    with pytest.raises(ArgumentError, match="avx512"):
        library.library()
