"""The examples run, with few steps."""

from __future__ import annotations

import importlib.util
import sys
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


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--active", "0"), "active=0.0"),
        (("--active", "2"), "active=2.0"),
        (("--active", "nan"), "active=nan"),
        (("--steps", "-4"), "steps=-4"),
        (("--steps", "0"), "steps=0"),
        (("--seed", "-1"), "seed=-1"),
    ],
)
def test_gated_mlp_refuses_in_one_line(monkeypatch, capsys, arguments, named):
    monkeypatch.setattr(sys, "argv", ["gated_mlp.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        load("gated_mlp").main()
    assert stopped.value.code == 2
    assert f"error: {named}: must be" in capsys.readouterr().err
