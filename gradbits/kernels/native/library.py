"""The native library: found, checked and loaded on first use, or the reason why not."""

from __future__ import annotations

import ctypes
import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from gradbits.core.errors import ArgumentError

SWITCH = "GRADBITS_NATIVE"
LEVELS = {"portable": 0, "avx2": 1, "avx512": 2, "amx": 3}
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Library:
    """The loaded library and the instruction set to use.

    Args:
        handle: the shared library.
        level: 0 portable, 1 AVX2, 2 AVX-512 with VNNI, 3 AMX too.
        pooled: whether it shares PyTorch's threads; otherwise it runs on one.
    """

    handle: ctypes.CDLL
    level: int
    pooled: bool

    @property
    def name(self) -> str:
        """The instruction set."""
        name: bytes = self.handle.gradbits_name(self.level)
        return name.decode()

    @property
    def threads(self) -> int:
        """How many threads a kernel may use now."""
        return torch.get_num_threads() if self.pooled else 1

    def call(self, function: str, args: ctypes.Structure) -> None:
        """Call kernel ``function``.

        Raises:
            MemoryError: no room for its work space.
        """
        if self.status(function, args):
            raise MemoryError(f"native kernel {function}: no memory for its work space")

    def status(self, function: str, args: ctypes.Structure) -> int:
        """Call kernel ``function`` and return what it returned: 0 where all is well."""
        status: int = getattr(self.handle, function)(self.level, ctypes.byref(args))
        return status


def source_stamp() -> str | None:
    """Return the digest of the sources beside this file, as setup.py computes it, or None where they are absent."""
    paths = sorted(path for path in HERE.iterdir() if path.suffix in (".cpp", ".inl", ".h"))
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()[:16] if paths else None


def load(path: Path, level: str = "") -> Library | str:
    """Return the library at ``path``, or why it cannot be used.

    Args:
        path: the shared library.
        level: a name in ``LEVELS``, or empty for the best that the processor has.
    """
    if not path.exists():
        return "no compiler was found at install, or it failed; install again with a C++ compiler"
    try:
        handle = ctypes.CDLL(str(path))
        handle.gradbits_stamp.restype = ctypes.c_char_p
        handle.gradbits_name.restype = ctypes.c_char_p
        built_from = handle.gradbits_stamp().decode()
    except (OSError, AttributeError) as error:
        return f"{path.name} does not load: {error}"
    if built_from != (source_stamp() or built_from):
        return "compiled from other sources than these are; install again"
    best = handle.gradbits_level()
    wanted = LEVELS[level] if level else best
    if wanted > best:
        return f"{SWITCH}={level}: this processor does not have these instructions"
    return Library(handle, wanted, _share_pool(handle))


def _share_pool(handle: ctypes.CDLL) -> bool:
    """Give the library the entry point of the OpenMP runtime that PyTorch runs on; return whether there is one."""
    if not torch.backends.openmp.is_available():
        return False
    try:
        entry = ctypes.CDLL(None).GOMP_parallel  # PyTorch puts its runtime among the global symbols
    except (AttributeError, OSError, TypeError):
        return False
    handle.gradbits_set_pool(ctypes.cast(entry, ctypes.c_void_p))
    return True


@lru_cache(maxsize=1)
def library() -> Library | str:
    """Return the library, or why there is none; asked once, so ``GRADBITS_NATIVE`` counts as it is then.

    Raises:
        ArgumentError: ``GRADBITS_NATIVE`` is none of 0, 1 and the instruction sets.
    """
    switch = os.environ.get(SWITCH, "1")
    if switch == "0":
        return f"switched off by {SWITCH}=0"
    if switch not in ("", "1", *LEVELS):
        raise ArgumentError(f"{SWITCH}={switch!r}: must be 0, 1 or an instruction set: {', '.join(LEVELS)}")
    return load(HERE / "_native.so", switch if switch in LEVELS else "")


def why_not() -> str | None:
    """Return why there is no native library, or None."""
    found = library()
    return found if isinstance(found, str) else None


def why_not_floats(x: torch.Tensor) -> str | None:
    """Return why the kernels that take whole tensors of floats cannot take ``x``, or None."""
    if x.device.type != "cpu":
        return "runs on the processor"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"dtype {x.dtype} is neither float32 nor bfloat16"
    return why_not()


def loaded() -> Library:
    """Return the library of a kernel that was chosen because it is there."""
    found = library()
    assert isinstance(found, Library), found
    return found
