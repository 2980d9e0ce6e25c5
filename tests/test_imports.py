"""Imports go downwards only, and importing the package starts nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gradbits

PACKAGE = Path(gradbits.__file__).parent
ORDER = (
    "core",
    "kernels",
    "quantizers",
    "recipes",
    "nn",
    "wire",
    "optim",
    "storage",
    "export",
    "observe",
    "train",
    "bench",
    "integrations",
    "cli",
)
ROOT_FILES = ("__init__.py", "__main__.py")
FILES = sorted(p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    """Return the gradbits modules that a file imports anywhere, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; the direction test reads absolute ones"
            # "from gradbits import nn" imports gradbits.nn
            whole = node.module == "gradbits"
            found |= {f"gradbits.{a.name}" if whole else str(node.module) for a in node.names}
    return {name for name in found if name.split(".")[0] == "gradbits"}


def test_every_package_has_its_place():
    packages = {p.parts[0] for p in FILES if len(p.parts) > 1}
    assert packages <= set(ORDER), f"say where {packages - set(ORDER)} belongs"
    assert {p.name for p in FILES if len(p.parts) == 1} <= set(ROOT_FILES)


def level(name: str) -> int:
    """Return where a gradbits module stands; the root stands on everything that it imports."""
    parts = name.split(".")
    if len(parts) > 1 and parts[1] in ORDER:
        return ORDER.index(parts[1])
    below = {n for n in imports_of(Path("__init__.py")) if n.count(".")}
    return max(level(n) for n in below)


@pytest.mark.parametrize("path", [p for p in FILES if len(p.parts) > 1], ids=str)
def test_imports_go_downwards(path):
    own = ORDER.index(path.parts[0])
    for name in imports_of(path):
        root = name.split(".")[1:2] not in [[package] for package in ORDER]
        # what stands above all that the root gathers may use it as a user does; nothing below may
        assert level(name) < own or (level(name) == own and not root), f"{path}: imports {name}, which stands above it"


def test_the_walker_sees_lazy_imports(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("def f():\n    from gradbits.cli import app\n    import gradbits.nn.layers\n")
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    assert imports_of(Path("a.py")) == {"gradbits.cli", "gradbits.nn.layers"}


PROBE = """
import builtins, sys, threading
import torch
before = threading.active_count()
rng = torch.get_rng_state()
opened = []
real = builtins.open
def watch(file, *args, **kwargs):
    opened.append(str(file))
    return real(file, *args, **kwargs)
builtins.open = watch
import gradbits
builtins.open = real
assert not torch.cuda.is_initialized(), "CUDA was initialised"
assert threading.active_count() == before, "a thread was started"
assert torch.equal(rng, torch.get_rng_state()), "the random state moved"
heavy = ("matplotlib", "onnx", "onnxscript", "onnxruntime", "lightning", "transformers", "accelerate", "plotly",
         "triton", "zstandard", "torchvision")
loaded = [m for m in heavy if m in sys.modules]
assert not loaded, f"imported: {loaded}"
data = [f for f in opened if not f.endswith((".py", ".pyc"))]
assert not data, f"read: {data}"
ours = [m for m in sys.modules if m.startswith(("gradbits.train", "gradbits.cli", "gradbits.integrations"))]
assert not ours, f"imported: {ours}"
print("quiet")
"""


def test_import_starts_nothing():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBE], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "quiet\n"


def test_public_names():
    assert len(gradbits.__all__) == len(set(gradbits.__all__))
    for name in gradbits.__all__:
        assert hasattr(gradbits, name), name
    required = {"QTensor", "Recipe", "Report", "dequantize_", "quantize_", "recipe", "recipes", "report", "nn", "optim"}
    assert required <= set(gradbits.__all__)
