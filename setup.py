"""Compiles the optional native kernels; an install without a compiler succeeds and runs on torch operations."""

from __future__ import annotations

import hashlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("gradbits/kernels/native")
# -ffp-contract=off: every operation rounds once, as in the torch reference
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
]


def stamp() -> str:
    """Return a digest of the sources; the loader refuses a library that was built from others."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".cpp", ".inl", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()[:16]


class BuildNative(build_ext):
    """Builds a plain shared library, and goes on without it where that fails."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the file name without the Python version: the library knows nothing of Python."""
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Export nothing by list; the sources say what is visible."""
        return []

    def build_extension(self, ext: Extension) -> None:
        """Compile, or say why not."""
        try:
            super().build_extension(ext)
        except Exception as error:
            print(f"gradbits: native kernels not built ({error}); everything runs on torch operations instead")


setup(
    ext_modules=[
        Extension(
            "gradbits.kernels.native._native",
            sorted(str(path) for path in SOURCES.glob("*.cpp")),
            depends=sorted(str(path) for path in (*SOURCES.glob("*.inl"), *SOURCES.glob("*.h"))),
            define_macros=[("GB_STAMP", f'"{stamp()}"')],
            extra_compile_args=FLAGS,
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
