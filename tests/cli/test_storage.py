"""``gradbits compress``, ``decompress``, ``inspect`` and ``verify`` as a user types them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gradbits.cli.app import run


class Shell:
    """Runs one command line in this process; keeps what it printed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *words: str | Path) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["gradbits", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            run()
        out, err = self.capsys.readouterr()
        code = left.value.code
        return code if isinstance(code, int) else 0, out, err


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    state = {"fc.weight": torch.randn(64, 80), "conv.weight": torch.randn(16, 8, 3, 3), "fc.bias": torch.randn(64)}
    save_file(state, tmp_path / "model.safetensors", metadata={"epoch": "2"})
    return tmp_path / "model.safetensors"


def test_compress_verify_inspect_decompress(shell: Shell, model: Path, tmp_path: Path) -> None:
    code, out, err = shell("compress", model)
    assert (code, err) == (0, "")
    packed = tmp_path / "model.gbz"
    size = packed.stat().st_size
    original = 4 * (64 * 80 + 16 * 8 * 9 + 64)
    assert f"{original:,} bytes of tensors in a file of {size:,} bytes, {original / size:.2f}x" in out
    for word in ("fc.weight", "conv.weight", "fc.bias", "shared, dense", "max error", "rms error"):
        assert word in out
    assert shell("verify", packed)[:2] == (0, f"{packed}: 3 tensors, all checksums match\n")

    code, out, _ = shell("inspect", packed, "--against", model, "--plot", tmp_path / "plot.png")
    assert code == 0
    assert "measured against" in out
    assert "64x80" in out
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "recorded when it was compressed" in shell("inspect", packed)[1]

    code, out, _ = shell("decompress", packed, "--out", tmp_path / "back.safetensors")
    assert code == 0
    found, state = load_file(tmp_path / "back.safetensors"), load_file(model)
    assert {name: one.shape for name, one in found.items()} == {name: one.shape for name, one in state.items()}
    assert torch.equal(found["fc.bias"], state["fc.bias"])
    assert 0 < float((found["fc.weight"] - state["fc.weight"]).abs().max()) < 0.3


def test_bits_by_glob_and_lossless(shell: Shell, model: Path, tmp_path: Path) -> None:
    words = ("compress", model, "--quiet", "--overwrite")
    assert shell(*words, "--bits", "fc.*=3", "--bits", "conv.*=keep")[0] == 0
    out = shell("inspect", tmp_path / "model.gbz", "--against", model)[1]
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert " 8 " in rows["fc.weight"]
    assert "shared" not in rows["conv.weight"]
    assert shell(*words, "--lossless", "--coder", "zstd")[0] == 0
    assert shell("decompress", tmp_path / "model.gbz", "-o", tmp_path / "b.safetensors", "-q")[0] == 0
    found, state = load_file(tmp_path / "b.safetensors"), load_file(model)
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_budgets(shell: Shell, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shell("compress", model, "--max-size", "3.5KB")[0] == 0
    assert (tmp_path / "model.gbz").stat().st_size <= 3500
    code, _, err = shell("compress", model, "--max-size", "1KB", "--overwrite")
    assert code == 2
    assert "smallest file" in err
    (tmp_path / "scoring.py").write_text(
        "def score(state):\n    return -float(state['fc.weight'].unique().numel() < 20)\n"
    )
    monkeypatch.chdir(tmp_path)
    code, out, _ = shell("compress", model, "--calibrate", "scoring:score", "--max-drop", "0.5", "--overwrite")
    assert code == 0
    assert "score 0, uncompressed 0" in out.replace("-0", "0")
    code, _, err = shell("compress", model, "--calibrate", "scoring:nothing", "--overwrite")
    assert (code, "cannot be imported" in err) == (2, True)


def test_errors_are_one_line_with_exit_code_2(shell: Shell, model: Path, tmp_path: Path) -> None:
    packed = tmp_path / "model.gbz"
    assert shell("compress", model, "-q")[0] == 0
    before = packed.read_bytes()
    damaged = tmp_path / "damaged.gbz"
    damaged.write_bytes(before[:-9] + b"\xff" + before[-8:])
    cases = {
        "is there already": ("compress", model),
        "is the source itself": ("compress", packed, "--out", packed, "--overwrite"),
        "linear_bits=12": ("compress", model, "--linear-bits", "12", "--overwrite"),
        "must be GLOB=BITS": ("compress", model, "--bits", "fc", "--overwrite"),
        "--max-size 'much'": ("compress", model, "--max-size", "much", "--overwrite"),
        "MODULE:FUNCTION": ("compress", model, "--calibrate", "x", "--overwrite"),
        "leaves no bits": ("compress", model, "--lossless", "--max-size", "1MB", "--overwrite"),
        "cannot be read": ("verify", tmp_path / "nowhere.gbz"),
        "damaged.gbz": ("verify", damaged),
        "not a gbz file": ("inspect", model),
        "checksum": ("decompress", damaged),
    }
    for text, words in cases.items():
        code, _, err = shell(*words)
        assert code == 2, words
        assert text in err, words
        assert err.startswith("gradbits: error: ")
        assert err.count("\n") == 1
    assert packed.read_bytes() == before
    assert not (tmp_path / "damaged.safetensors").exists()
