"""The verb ``export``: from a trained file to onnxruntime, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gradbits.cli import main
from gradbits.train.evaluate_file import evaluate_file
from gradbits.train.export_file import export_file
from gradbits.train.models import build_model


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gradbits", *arguments])
    try:
        main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


TRAIN = ("--data", "digits", "--limit", "256", "--model", "small_cnn", "--model-set", "width=12", "--steps", "4")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        code = run(patch, "train", *TRAIN, "--recipe", "qat_int8", "--set", "weight.bits=6", "--out", str(out))
    assert code == 0
    return out


def model_of(folder: Path) -> Path:
    (path,) = (folder / "models").glob("*.safetensors")
    return path


@pytest.mark.filterwarnings("ignore:.*onnx.*:DeprecationWarning")
def test_train_export_check(trained, tmp_path, monkeypatch, capsys):
    out = tmp_path / "net.onnx"
    assert run(monkeypatch, "export", str(model_of(trained)), "--out", str(out), "--check") == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("fp32", "qdq", "integer", "convert_", "360 test samples"))
    assert out.stat().st_size > 1000

    done = export_file(model_of(trained), out, form="integer", check=True)
    rows = {row.name: row for row in done.checked}
    for name in ("integer", "convert_"):
        assert (rows[name].differing, rows[name].answers, rows[name].largest) == (0, 0, 0.0)
    assert rows["qdq"].differing is not None
    assert rows["qdq"].answers == 0
    assert rows["qdq"].accuracy == rows["convert_"].accuracy
    assert rows["integer"].nbytes < rows["fp32"].nbytes
    assert all(rows[name].ms_one > 0 for name in ("fp32", "qdq", "integer"))
    (checkpoint,) = (trained / "checkpoints").glob("*.pt")
    again = export_file(checkpoint, tmp_path / "again.onnx", form="integer")
    assert again.path.read_bytes() == out.read_bytes()


def test_the_file_loads_into_a_float_model_and_evaluates_as_the_run_did(trained):
    path = model_of(trained)
    with safe_open(path, "pt") as file:
        ranges = json.loads(file.metadata()["ranges"])
    assert any(name.endswith("__low") for name in ranges)
    arguments = {"in_channels": 1, "image_size": (8, 8), "classes": 10}
    build_model("small_cnn", arguments, {"width": 12}).load_state_dict(load_file(path), strict=True)
    (record,) = json.loads((trained / "results.json").read_text())
    found = evaluate_file(path, recipe="qat_int8:weight.bits=6")
    assert found.value == record["test_accuracy"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--form", "fast"), "form='fast'"),
        (("--threads", "0"), "threads=0"),
        (("--recipe", "unified_int8"), "no recipe for integer inference"),
        (("--recipe", "fp32"), "no recipe for integer inference"),
        (("--model", "mlp"), "does not fit model 'mlp'"),
    ],
)
def test_what_is_refused(trained, tmp_path, monkeypatch, capsys, arguments, named):
    out = tmp_path / "net.onnx"
    assert run(monkeypatch, "export", str(model_of(trained)), "--out", str(out), *arguments) == 2
    message = capsys.readouterr().err
    assert named in message
    assert message.count("\n") == 1
    assert not out.exists()


def test_files_without_ranges_or_with_bad_ones(trained, tmp_path, monkeypatch, capsys):
    path, tensors = tmp_path / "other.safetensors", load_file(model_of(trained))
    with safe_open(model_of(trained), "pt") as file:
        metadata = dict(file.metadata())
    for ranges, named in (
        (None, "are not known"),
        ("[1]", "metadata ranges"),
        ('{"a": "b"}', "metadata ranges"),
        ("{", "metadata ranges"),
    ):
        kept = {k: v for k, v in metadata.items() if k != "ranges"}
        save_file(tensors, path, {**kept, **({} if ranges is None else {"ranges": ranges})})
        assert run(monkeypatch, "export", str(path)) == 2
        assert named in capsys.readouterr().err
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pt")
    assert run(monkeypatch, "export", str(tmp_path / "x.pt"), "--data", "digits", "--model", "mlp") == 2
    assert "recipe" in capsys.readouterr().err
    assert run(monkeypatch, "export", str(tmp_path / "absent")) == 2


def test_the_model_itself_is_never_written_over(trained, tmp_path, monkeypatch, capsys):
    model = tmp_path / "model.safetensors"
    model.write_bytes(model_of(trained).read_bytes())
    before = model.read_bytes()
    soft, hard = tmp_path / "soft.onnx", tmp_path / "hard.onnx"
    soft.symlink_to(model)
    hard.hardlink_to(model)
    program = tmp_path / "program.pt2"  # with the suffix that the form has anyway
    program.symlink_to(model)
    for source, arguments in (
        (model, ("--out", str(model))),
        (model, ("--out", str(tmp_path / "." / "model.safetensors"))),
        (model, ("--out", str(soft))),
        (model, ("--out", str(hard), "--form", "integer")),
        (program, ("--form", "pt2")),
    ):
        assert run(monkeypatch, "export", str(source), *arguments) == 2
        assert "must be another file" in capsys.readouterr().err
        assert model.read_bytes() == before


def test_arguments_of_the_model_have_their_own_example(trained, tmp_path, monkeypatch, capsys):
    legal = "model_set='foo': must be name=value, for example width=8"
    assert run(monkeypatch, "export", str(model_of(trained)), "--model-set", "foo") == 2
    assert legal in capsys.readouterr().err
    assert run(monkeypatch, "train", "--model-set", "foo", "--out", str(tmp_path / "new")) == 2
    assert legal in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("bits", ["8,,4", "8,4,", ",8", ""])
def test_an_empty_number_of_bits_is_none(tmp_path, monkeypatch, capsys, bits):
    arguments = ("--recipe", "fp32", "--eval-bits", bits, "--out", str(tmp_path / "new"))
    assert run(monkeypatch, "train", *TRAIN, *arguments) == 2
    assert f"eval_bits={bits!r}: must be integers with commas between them" in capsys.readouterr().err


def test_the_help_names_both_suffixes(monkeypatch, capsys):
    assert run(monkeypatch, "export", "--help") == 0
    assert ".pt2" in capsys.readouterr().out
