"""``gradbits bench`` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gradbits", "bench", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_the_record_and_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "a" / "step.json", tmp_path / "step.png"
    done = command(
        "step", "--work", "conv", "--quick", "--no-torchao", "--repeats", "1", "--threads", "1", "--clock", "cpu",
        "--recipe", "int8_dynamic", "--json", str(out), "--chart", str(picture),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record["clock"] == "cpu"
    assert record["threads"] == 1
    assert set(record["limits"]) == {"fp32", "bf16", "int8", "memory"}
    (work,) = record["works"]
    assert [row["name"] for row in work["contestants"]] == [
        "fp32 eager",
        "bf16 eager",
        "int8_dynamic",
        "int8_dynamic + bf16",
    ]
    assert all(len(row["times_ms"]) == 1 for row in work["contestants"])
    assert work["best"]["name"].startswith("int8_dynamic")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "best of gradbits" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("step", "--work", "vgg"), "work='vgg'"),
        (("step", "--recipe", "int3"), "int3"),
        (("memory", "--model", "linear"), "model='linear'"),
        (("memory", "--recipe", "foo"), "foo"),
        (("gemm", "--clock", "sun"), "clock='sun'"),
        (("gemm", "--repeats", "0"), "repeats=0"),
        (("quantize", "--threads", "0"), "threads=0"),
        (("conv", "--batch", "0"), "batch=0"),
    ],
)
def test_nonsense_is_refused_before_anything_runs(arguments, named):
    done = command(*arguments)
    assert done.returncode == 2
    assert named in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout


@pytest.mark.parametrize("subcommand", ["gemm", "memory"])
@pytest.mark.parametrize("name", ["x.txt", "x", ".png", "x.pgf"])
def test_a_chart_of_no_known_format_is_refused_before_anything_runs(subcommand, name, tmp_path):
    pytest.importorskip("matplotlib")
    done = command(subcommand, "--quick", "--chart", str(tmp_path / name))
    assert done.returncode == 2
    assert f"{name}'" in done.stderr
    assert ".png, " in done.stderr
    assert ".svg" in done.stderr
    assert not done.stdout
    assert not list(tmp_path.iterdir())
