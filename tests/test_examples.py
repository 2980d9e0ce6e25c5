"""The examples run, with few steps."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("estimator", load("gated_mlp").GATES)
def test_gated_mlp_learns_with_one_unit_in_ten(estimator):
    accuracy, opened = load("gated_mlp").train(estimator, steps=80)
    assert accuracy > 0.4  # of ten classes
    assert 0.03 < opened < 0.2
