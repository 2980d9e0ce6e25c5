"""``gradbits doctor`` and ``gradbits recipes`` as a user runs them."""

from __future__ import annotations

import subprocess
import sys

import gradbits as gb
from gradbits.kernels.dispatch import kernel_table


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gradbits", *arguments], capture_output=True, text=True, timeout=300, check=False
    )


def test_doctor_names_every_operation_and_what_computes_it() -> None:
    done = command("doctor")
    assert done.returncode == 0, done.stderr
    for text in ("torch", "processor", "C++ compiler", "Kernel paths", *kernel_table()):
        assert text in done.stdout
    backends = {kernel.backend for kernels in kernel_table().values() for kernel in kernels}
    assert any(backend in done.stdout for backend in backends)


def test_recipes_lists_all_and_shows_one() -> None:
    listed = command("recipes")
    assert listed.returncode == 0, listed.stderr
    shown = command("recipes", "unified_int8")
    for info in gb.recipes().values():
        assert info.name in listed.stdout
    for text in ("1912.12607", "grad_weight.gradient", "keep_float", "DirectionClip"):
        assert text in shown.stdout


def test_everything_that_makes_a_recipe_is_shown() -> None:
    shown = command("recipes", "int4_transformer").stdout
    for text in ("2 × 4 bits", "Hadamard(size=0", "grad_weight.sampling", "Leverage(keep=0.5", "learned_steps"):
        assert text in shown
    assert "int4_transformer:option=value" in shown


def test_an_unknown_recipe_is_one_line() -> None:
    done = command("recipes", "unified_int9")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "unified_int9" in done.stderr
    assert "unified_int8" in done.stderr
