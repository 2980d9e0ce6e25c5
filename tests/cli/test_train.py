"""``gradbits train`` as a user runs it: the real command in a process of its own, on tiny runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TINY = ["--model", "small_cnn", "--model-set", "width=4", "--limit", "256", "--threads", "1", "--log-every", "2"]
TIMES = ("step_ms", "step_ms_median", "seconds")


def gradbits(*arguments, cwd, check=True):
    done = subprocess.run(
        [sys.executable, "-m", "gradbits", "train", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def refused(done, *named):
    """One line on stderr that names what is wrong, and nothing of Python."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("gradbits: error: ")
    for text in named:
        assert str(text) in done.stderr


def records(out):
    return json.loads((Path(out) / "results.json").read_text())


def untimed(values):
    return [{key: value for key, value in each.items() if key not in TIMES} for each in values]


def log(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def test_a_comparison_from_start_to_table(tmp_path):
    done = gradbits(
        "--compare", "fp32,bf16,int8_dynamic,unified_int8:gradient.bits=5", "--seeds", "0,1", "--epochs", "1", *TINY,
        "--out", "run", "--overwrite", cwd=tmp_path,
    )  # fmt: skip
    assert "fp32 seed 0  step 2/2  loss" in done.stdout
    for text in ("unified_int8:gradient.bits=5", "1.00x", "±", " pt", "2 seeds", "run/results.json"):
        assert text in done.stdout
    assert not done.stderr
    found = records(tmp_path / "run")
    assert [(r["recipe"], r["seed"]) for r in found] == [
        (name, seed) for seed in (0, 1) for name in ("fp32", "bf16", "int8_dynamic", "unified_int8")
    ]
    assert [r["gradient_bits"] for r in found[:3]] == [32.0, 16.0, 8.0]
    assert found[0]["command"].endswith("--out run --overwrite")
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_text_from_a_file_with_overrides(tmp_path):
    (tmp_path / "book.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    done = gradbits(
        "--text", "book.txt", "--model-set", "d_model=16", "--model-set", "layers=1", "--model-set", "context=16",
        "--recipe", "int8_dynamic", "--set", "gradient.bits=6", "--steps", "8", "--batch-size", "4", "--threads", "1",
        cwd=tmp_path,
    )  # fmt: skip
    assert "runs/001-text-gpt" in done.stdout
    (record,) = records(tmp_path / "runs" / "001-text-gpt")
    assert record["recipe"] == "int8_dynamic"
    assert record["overrides"] == {"gradient.bits": "6"}
    assert record["gradient_bits"] == 6.0
    assert 0 < record["bits_per_byte"] < 9
    assert record["model_options"]["d_model"] == 16


STOPPING = """
import os, signal
from torch import nn

class Net(nn.Sequential):
    calls = 0
    def forward(self, x):
        if self.training and "STOP" in os.environ:
            Net.calls += 1
            if Net.calls == int(os.environ["STOP"]):
                os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
        return super().forward(x)

def net(in_channels, classes):
    return Net(nn.Conv2d(in_channels, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, classes))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    (folder / "nets.py").write_text(STOPPING)
    gradbits(*STOPPABLE, "--out", "run", cwd=folder)
    return folder / "run"


STOPPABLE = [
    "--model", "nets:net", "--compare", "fp32,unified_int8", "--limit", "256", "--steps", "14", "--save-every", "3",
    "--threads", "1", "--log-every", "2",
]  # fmt: skip


def test_a_stopped_run_says_how_to_go_on_and_ends_bit_identically(tmp_path, monkeypatch, whole):
    (tmp_path / "nets.py").write_text(STOPPING)
    # in the first network; in the second one, in the middle of an epoch; shortly after that, without a farewell
    for arguments, count, name, code in (
        (STOPPABLE, 7, "SIGINT", 130),
        (["--resume"], 12, "SIGTERM", 143),
        (["--resume"], 5, "SIGKILL", -9),
    ):
        with monkeypatch.context() as patch:
            patch.setenv("STOP", str(count))
            patch.setenv("SIGNAL", name)
            done = gradbits(*arguments, "--out", "run", cwd=tmp_path, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "run" / "results.json").exists()
        assert not list(tmp_path.glob("run/**/*.tmp"))
        if name != "SIGKILL":
            assert "stopped, the state is saved; to go on: " in done.stdout
            assert done.stdout.rstrip().endswith("-m gradbits train --out run --resume")
    done = gradbits("--out", "run", "--resume", cwd=tmp_path)
    assert "resumed at step" in done.stdout
    assert untimed(records(tmp_path / "run")) == untimed(records(whole))
    assert untimed(log(tmp_path / "run")) == untimed(log(whole))
    for path in (whole / "checkpoints").iterdir():
        one, other = (torch.load(p, weights_only=True) for p in (path, tmp_path / "run" / "checkpoints" / path.name))
        assert all(torch.equal(one["tensors"][key], other["tensors"][key]) for key in one["tensors"])


def test_what_is_damaged_is_named_in_one_line(tmp_path, whole):
    (tmp_path / "nets.py").write_text(STOPPING)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for name in ("options.json", "log.jsonl", "checkpoints/1-fp32-seed0.pt"):
        (run / name).write_bytes((whole / name).read_bytes())
    checkpoint = run / "checkpoints" / "1-fp32-seed0.pt"
    raw = checkpoint.read_bytes()
    checkpoint.write_bytes(raw[: len(raw) // 2])
    refused(gradbits("--out", "run", "--resume", cwd=tmp_path, check=False), "1-fp32-seed0.pt", "truncated")
    assert checkpoint.read_bytes() == raw[: len(raw) // 2]
    checkpoint.write_bytes(raw)
    refused(gradbits("--out", "run", "--resume", "--lr", "0.7", cwd=tmp_path, check=False), "lr=0.7", "0.001")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--data", "fashion-mnist", "--data-dir", "absent"], ["dataset-fashion-mnist", "--data-dir"]),
        (["--recipe", "int9"], ["'int9'", "int8_dynamic"]),
        (["--out", "."], ["is not empty"]),
    ],
)
def test_what_is_not_legal_is_refused_in_one_line(tmp_path, arguments, named):
    (tmp_path / "mine.txt").write_text("keep")
    refused(gradbits(*arguments, cwd=tmp_path, check=False), *named)
    assert (tmp_path / "mine.txt").read_text() == "keep"
