"""Run the tests of the native kernels with the address and undefined-behaviour sanitizers.

    python tests/kernels/sanitize.py [further arguments of pytest]

Copies the package to a temporary folder, builds the library there with the sanitizers and runs the tests against it.
Needs g++ with its sanitizer libraries.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-sanitize=alignment -O1 -g"


def main() -> None:
    """Build, then test."""
    runtime = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder)
        shutil.copytree(
            ROOT / "gradbits", Path(folder, "gradbits"), ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
        shutil.copytree(ROOT / "tests" / "kernels", Path(folder, "tests"), ignore=shutil.ignore_patterns("__pycache__"))
        build = {**os.environ, "CFLAGS": OPTIONS, "CXXFLAGS": OPTIONS, "LDFLAGS": OPTIONS}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(command, cwd=folder, env=build, check=True, stderr=subprocess.DEVNULL)
        test = {
            **os.environ,
            "PYTHONPATH": folder,
            "LD_PRELOAD": ":".join(runtime),
            # the interpreter keeps memory until it ends, and loads C++ libraries in its own way
            "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
        }
        tests = sorted(str(path) for path in Path(folder, "tests").glob("test_native*.py"))
        command = [sys.executable, "-m", "pytest", "-q", "-rs", *tests, *sys.argv[1:]]
        sys.exit(subprocess.run(command, cwd=folder, env=test, check=False).returncode)


if __name__ == "__main__":
    main()
