"""``gradbits evaluate``, and a model on its whole way: trained, compressed, decompressed, evaluated."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gradbits.cli.app import run

TINY = ("--model", "small_cnn", "--model-set", "width=4", "--threads", "1", "--epochs", "3", "--limit", "512")
DIGITS = ("--data", "digits", "--model", "small_cnn", "--model-set", "width=4", "--limit", "512")


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

    def result(self, *words: str | Path) -> str:
        """Return what evaluate says of a file, without its name."""
        code, out, err = self("evaluate", *words)
        assert (code, err) == (0, "")
        name, _, result = out.strip().partition(": ")
        assert name == str(words[0])
        return result


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a pruned and shared float network and a quantized one."""
    out = tmp_path_factory.mktemp("trained") / "run"
    words = ["train", *TINY, "--compare", "fp32,unified_int8", "--prune", "0.6", "--share", "5", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gradbits", *words])
        with pytest.raises(SystemExit) as left:
            run()
    assert not left.value.code
    return out


def test_the_four_commands_keep_the_accuracy(shell: Shell, trained: Path, tmp_path: Path) -> None:
    for record in json.loads((trained / "results.json").read_text()):
        model, packed, back = trained / record["model_file"], tmp_path / "m.gbz", tmp_path / "back.safetensors"
        code, out, _ = shell("compress", model, "--out", packed, "--overwrite")
        assert code == 0
        assert packed.stat().st_size < model.stat().st_size / 2
        assert shell("decompress", packed, "--out", back, "--overwrite")[0] == 0
        # compress said that no tensor lost anything, so not one bit of the models differs
        assert {row.split()[-2] for row in out.splitlines() if "shared, " in row} == {"0"}
        one, other = load_file(model), load_file(back)
        assert all(torch.equal(one[name], other[name]) for name in one)
        result = shell.result(packed)
        assert result == shell.result(back) == shell.result(model)
        if record["network"] == "fp32":
            assert result == (
                f"test accuracy {100 * record['test_accuracy']:.2f} % on 360 test samples (digits, small_cnn, fp32)"
            )


def test_what_compress_loses_is_the_same_before_and_after_shipping(shell: Shell, trained: Path, tmp_path: Path) -> None:
    model, packed, back = (
        trained / "models" / "fp32-seed0.safetensors",
        tmp_path / "m.gbz",
        tmp_path / "back.safetensors",
    )
    words = ("--bits", "*.weight=1", "--sparsity", "0.9")
    assert shell("compress", model, "--out", packed, *words)[0] == 0
    assert shell("decompress", packed, "--out", back)[0] == 0
    assert shell.result(packed) == shell.result(back) != shell.result(model)


def test_a_quantized_network_is_evaluated_as_it_was_trained(shell: Shell, trained: Path) -> None:
    record = json.loads((trained / "results.json").read_text())[1]
    checkpoint = trained / "checkpoints" / "2-unified_int8-seed0.pt"
    accuracy = f"test accuracy {100 * record['test_accuracy']:.2f} % on 360 test samples (digits, small_cnn, "
    assert shell.result(checkpoint, "--recipe", "unified_int8") == accuracy + "unified_int8)"
    two = "unified_int8:output.weight.bits=2"
    coarse = shell.result(trained / record["model_file"], "--recipe", two)
    assert coarse.endswith(f"{two})")
    assert coarse.split(" % ")[0] not in accuracy


def test_options_stand_in_for_missing_metadata(shell: Shell, trained: Path, tmp_path: Path) -> None:
    model, bare = trained / "models" / "fp32-seed0.safetensors", tmp_path / "bare.safetensors"
    save_file(load_file(model), bare)
    assert shell.result(bare, *DIGITS) == shell.result(model)
    torch.save({"state_dict": load_file(model)}, tmp_path / "bare.pt")
    assert shell.result(tmp_path / "bare.pt", *DIGITS) == shell.result(model)


def test_a_text_model_is_measured_in_bits_per_byte(shell: Shell, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    words = ("--model-set", "d_model=16", "--model-set", "layers=1", "--model-set", "context=16", "--recipe", "fp32")
    run_words = ("--steps", "4", "--batch-size", "4", "--threads", "1", "--out", tmp_path / "run")
    assert shell("train", "--text", book, *words, *run_words)[0] == 0
    (record,) = json.loads((tmp_path / "run" / "results.json").read_text())
    model = tmp_path / "run" / record["model_file"]
    expected = f"test {record['bits_per_byte']:.4f} bits per byte on 256 test samples (bytes) (text, gpt, fp32)"
    assert shell.result(model, "--text", book) == expected
    code, _, err = shell("evaluate", model)
    assert (code, "--text FILE" in err) == (2, True)


def test_code_is_not_imported_on_a_files_word(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil.py").write_text("import pathlib\npathlib.Path('imported').touch()\n")
    monkeypatch.chdir(tmp_path)
    save_file({"w": torch.ones(2)}, tmp_path / "m.safetensors", metadata={"data": "digits", "model": "evil:net"})
    code, _, err = shell("evaluate", "m.safetensors")
    assert code == 2
    assert err == "gradbits: error: m.safetensors: names code as its model; if you trust it, give --model 'evil:net'\n"
    assert not (tmp_path / "imported").exists()


def test_nonsense_is_refused_in_one_line(shell: Shell, trained: Path, tmp_path: Path) -> None:
    model, checkpoint = trained / "models" / "fp32-seed0.safetensors", trained / "checkpoints" / "1-fp32-seed0.pt"

    def changed(name: str, source: Path, at: float, flip: int) -> Path:
        raw = bytearray(source.read_bytes())
        raw[int(at * len(raw))] ^= flip
        (tmp_path / name).write_bytes(raw)
        return tmp_path / name

    def said(**metadata: str) -> Path:
        path = tmp_path / f"{'-'.join(metadata)}.safetensors"
        save_file(load_file(model), path, metadata={"data": "digits", "model": "small_cnn", **metadata})
        return path

    assert shell("compress", model, "--out", tmp_path / "m.gbz")[0] == 0
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(model.read_bytes()[:-40])
    half = tmp_path / "half.pt"
    half.write_bytes(checkpoint.read_bytes()[: checkpoint.stat().st_size // 2])
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(model), bare)
    integers = tmp_path / "integers.safetensors"
    save_file({name: tensor.long() for name, tensor in load_file(model).items()}, integers)
    (tmp_path / "note.txt").write_text("hello")
    cases: list[tuple[str, tuple[str | Path, ...]]] = [
        ("nowhere.gbz: cannot be read", (tmp_path / "nowhere.gbz",)),
        ("must hold one", (tmp_path / "nothing", "--recipe", "fp32")),
        ("note.txt: neither gbz", (tmp_path / "note.txt",)),
        ("cut.safetensors", (cut,)),
        ("bare.safetensors: does not say its model; give --model", (bare,)),
        ("bare.safetensors: does not say its data; give --data", (bare, "--model", "small_cnn")),
        ("does not fit model 'small_cnn': 'bn1.bias' is [4], not [16]", (bare, *DIGITS[:4])),
        ("does not fit model 'mlp'", (model, "--model", "mlp")),
        ("'bn1.bias' is torch.int64, not torch.float32", (integers, *DIGITS)),
        ("model='gpt'", (model, "--model", "gpt")),
        ("model='big'", (model, "--model", "big")),
        ("data='cifar'", (model, "--data", "cifar")),
        ("'int9'", (model, "--recipe", "int9")),
        ("colour", (model, "--recipe", "int8_dynamic:colour=1")),
        ("'height'", (model, "--model-set", "height=3")),
        ("width=-1", (model, "--model-set", "width=-1")),
        ("metadata model_set='{'", (said(model_set="{"),)),
        ("metadata seed='x'", (said(seed="x"),)),
        ("metadata limit='-1'", (said(limit="-1"),)),
        ("half.pt: not a readable torch checkpoint", (half,)),
        *((f"{at}.gbz", (changed(f"{at}.gbz", tmp_path / "m.gbz", at, 4),)) for at in (0.01, 0.2, 0.5, 0.8, 0.97)),
    ]
    (tmp_path / "nothing").mkdir()
    for text, words in cases:
        code, out, err = shell("evaluate", *words)
        assert (code, out) == (2, ""), words
        assert text in err, (words, err)
        assert err.startswith("gradbits: error: ")
        assert err.count("\n") == 1, err
