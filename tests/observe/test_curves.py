"""The picture of a run is a complete PNG file."""

from __future__ import annotations

import builtins
import math

import pytest

from gradbits.core.errors import GradbitsError, MissingDependencyError
from gradbits.observe.curves import Curve, save_curves

CURVE = Curve(label="fp32", steps=[1, 2, 3], values=[1.0, math.nan, 0.5])


@pytest.mark.parametrize("panels", [[("loss", [CURVE, CURVE])], [("loss", [CURVE]), ("empty", [])], []])
def test_writes_a_png(tmp_path, panels):
    pytest.importorskip("matplotlib")
    save_curves(tmp_path / "curves.png", panels, title="digits")
    content = (tmp_path / "curves.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert content.rstrip().endswith(b"IEND\xaeB`\x82")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_names_what_is_missing(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"gradbits\[plot\]"):
        save_curves(tmp_path / "curves.png", [("loss", [CURVE])])
    assert not list(tmp_path.iterdir())


def test_an_unwritable_place_is_named(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(GradbitsError, match="cannot be written"):
        save_curves(tmp_path / "file" / "curves.png", [("loss", [CURVE])])
