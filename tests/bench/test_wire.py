"""``gradbits bench wire``: what it measures, predicts and says."""

from __future__ import annotations

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from gradbits.bench import gradients
from gradbits.bench.wire import Question, Row, measure, record, verdicts
from gradbits.cli.app import build
from gradbits.core.errors import ArgumentError

TOO_FAST = "too fast for compression"


def row(name, bits, steps, **more):
    """A row with these predictions."""
    numbers = {"ratio": 32 / bits, "encode": 1.0, "decode": 1.0, "encode_gb": 1.0, "decode_gb": 1.0}
    return Row(name=name, bits_per_element=bits, error=0.1, break_even=1.0, steps=steps, **{**numbers, **more})


def test_measured_rows_follow_the_formula():
    found = gradients.drawn(50_000)
    question = Question(names=("qsgd", "onebit"), bits=(2, 4), world=4, gbps=(0.5, 40.0), repeats=1)
    rows = {r.name: r for r in measure(found, question)}
    assert list(rows) == ["fp32", "fp16", "qsgd 2 bit", "qsgd 4 bit", "onebit"]
    assert rows["fp32"].steps == (1.5 * 50_000 * 32 / 0.5e6, 1.5 * 50_000 * 32 / 40e6)
    assert math.isinf(rows["fp32"].break_even)
    for r in rows.values():
        assert r.ratio == 32 / r.bits_per_element
        coding = r.encode + 1.75 * r.decode
        for gbps, step in zip(question.gbps, r.steps, strict=True):
            assert math.isclose(step, coding + 1.5 * 50_000 * r.bits_per_element / (gbps * 1e6))
        if r.name != "fp32":
            assert 0 < r.error < 6
            # at the break-even bandwidth both take the same time
            plain = 1.5 * 50_000 * 32 / (r.break_even * 1e6)
            assert math.isclose(plain, coding + 1.5 * 50_000 * r.bits_per_element / (r.break_even * 1e6))
    assert 4.0 < rows["qsgd 4 bit"].bits_per_element < 4.2
    assert rows["qsgd 4 bit"].error < rows["qsgd 2 bit"].error


def test_of_all_codecs_those_that_have_so_many_bits():
    names = set(Question(bits=(3,)).codecs())
    assert {"qsgd 3 bit", "alq 3 bit", "topk"} <= names
    assert not any(name.startswith("terngrad") for name in names)


def test_gradients_of_a_model_are_its_own():
    found = gradients.of_model("mlp", batch_size=32)
    assert found.values.numel() == sum(found.sizes)
    assert found.compute > 0
    assert bool(found.values.isfinite().all())
    assert torch.equal(found.values, gradients.of_model("mlp", batch_size=32).values)
    assert not torch.equal(found.values, gradients.of_model("mlp", batch_size=32, seed=1).values)


def test_verdicts_say_when_not_to_compress():
    question = Question(gbps=(0.1, 10.0))
    rows = [row("fp32", 32.0, (100.0, 1.0)), row("fp16", 16.0, (60.0, 2.0)), row("alq 3 bit", 3.0, (10.0, 3.0))]
    slow, fast = verdicts(rows, question)
    assert "alq 3 bit is fastest, 10 ms" in slow
    assert "10.00 times" in slow
    assert TOO_FAST in fast
    assert "1 ms with fp32, 3 ms with alq 3 bit" in fast


def test_the_record_is_json():
    found, question = gradients.drawn(2000), Question(names=("qsgd",), repeats=1)
    made = record(measure(found, question), question, found, "gradbits bench wire")
    assert json.loads(json.dumps(made, allow_nan=False)) == json.loads(json.dumps(made))
    assert made["rows"][0]["break_even"] is None
    assert made["gradient"]["numel"] == 2000


def test_command(tmp_path):
    file = tmp_path / "out.json"
    command = [
        "bench",
        "wire",
        "--numel",
        "20k",
        "--codecs",
        "qsgd, alq",
        "--entropy",
        "none,huffman",
        "--repeats",
        "1",
    ]
    done = CliRunner().invoke(build(), [*command, "--gbps", "0.01,1000", "--world", "2", "--json", str(file)])
    assert done.exit_code == 0, done.output
    assert "alq 3 bit + huffman" in done.output
    assert TOO_FAST in done.output
    assert len(json.loads(file.read_text())["rows"]) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--numel", "0"], "numel='0'.*25M"),
        (["--numel", "many"], "numel='many'"),
        (["--numel", "1M", "--model", "mlp"], "numel='1M'.*model='mlp'"),
        (["--numel", "10k", "--data", "digits"], "data='digits'.*--model"),
        (["--numel", "10k", "--batch-size", "8"], "batch_size=8.*--model"),
        (["--data", "digits"], "data='digits'.*--model"),
        (["--model", "mlp", "--batch-size", "0"], "batch_size=0"),
        (["--codecs", "mp3"], "codec='mp3'.*qsgd"),
        (["--codecs", "qsgd", "--bits", "9"], "bits=9"),
        (["--bits", "x"], "bits='x'"),
        (["--codecs", "qsgd", "--bits", "2.5"], "bits='2.5'"),
        (["--entropy", "gzip"], "entropy='gzip'.*huffman"),
        (["--codecs", "topk", "--entropy", "huffman"], "entropy='huffman'"),
        (["--world", "1"], "world=1"),
        (["--gbps", "0"], "gbps=0"),
        (["--gbps", "fast"], "gbps='fast'"),
        (["--gbps", ""], "gbps=''"),
        (["--threads", "0"], "threads=0"),
        (["--repeats", "0"], "repeats=0"),
        (["--clock", "sun"], "clock='sun'"),
        (["--model", "no_such"], "no_such"),
        (["--bucket", "0", "--codecs", "qsgd"], "bucket=0"),
        (["--bits", "9"], "bits=9"),
        (["--codecs", "terngrad", "--bits", "3"], "bits=3"),
        (["--json", f"{__file__}/x.json"], "json='.*test_wire.py/x.json'.*no folder"),
        (["--json", "/"], "json='/'.*folder"),
    ],
)
def test_nonsense_is_named(options, message):
    with pytest.raises(ArgumentError, match=message):
        CliRunner().invoke(build(), ["bench", "wire", *options], catch_exceptions=False)
