"""Reference runs of ewgs, lsq and gradient_l1, starts from a model file, and tests after post-training quantization."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from gradbits.core.errors import ArgumentError
from gradbits.train.experiment import Experiment
from gradbits.train.interrupt import Interrupted, StopRequest
from gradbits.train.options import TrainOptions

SMALL = {"data": "digits", "limit": 192, "batch_size": 32, "threads": 1, "model_set": ("width=4",)}


def run(tmp_path, name: str, **options):
    experiment = Experiment(TrainOptions(**{**SMALL, **options}), out=tmp_path / name)
    return experiment.run(), experiment


def test_ewgs_measures_its_factors_and_resumes_bit_for_bit(tmp_path, monkeypatch):
    options = {"networks": ("ewgs:weight.bits=1:hessian.probes=3", "lsq"), "steps": 14}
    whole, _ = run(tmp_path, "whole", **options)
    state = torch.load(next((tmp_path / "whole/checkpoints").glob("1-*")), weights_only=True)
    deltas = [value for name, value in state["tensors"].items() if name.endswith("_delta")]
    assert len(deltas) == 6  # three convolutions, two operands
    assert any(float(value) > 0 for value in deltas)

    calls = []

    def stop_at_nine(self):
        calls.append(1)
        if len(calls) == 9:
            raise Interrupted(2)

    with monkeypatch.context() as patched:
        patched.setattr(StopRequest, "check", stop_at_nine)
        with pytest.raises(Interrupted):
            run(tmp_path, "broken", **options)
    again = Experiment(TrainOptions(), out=tmp_path / "broken", resume=True).run()
    for one, two in zip(whole, again, strict=True):
        assert (one["train_loss"], one["test_accuracy"]) == (two["train_loss"], two["test_accuracy"])
    for path in (tmp_path / "whole/models").iterdir():
        other = load_file(tmp_path / "broken/models" / path.name)
        assert all(torch.equal(value, other[key]) for key, value in load_file(path).items())


def test_init_starts_every_network_from_a_file(tmp_path):
    run(tmp_path, "first", networks=("fp32",), steps=6)
    file = tmp_path / "first/models/fp32-seed0.safetensors"
    records, _ = run(tmp_path, "second", networks=("fp32", "ewgs:hessian=null"), steps=1, lr=1e-30, init=str(file))
    want, got = load_file(file), load_file(tmp_path / "second/models/fp32-seed0.safetensors")
    assert all(torch.equal(want[name], got[name]) for name in want if "running" not in name and "tracked" not in name)
    assert records[1]["init"] == str(file)
    with pytest.raises(ArgumentError, match="init"):
        run(tmp_path, "third", networks=("fp32",), steps=1, init=str(file), model_set=("width=8",))


def test_gradient_l1_and_bits_after_training(tmp_path):
    common = {"networks": ("fp32",), "steps": 6, "eval_bits": (8, 3)}
    plain, _ = run(tmp_path, "plain", **common)
    zero, _ = run(tmp_path, "zero", gradient_l1=0.0, **common)
    late, _ = run(tmp_path, "late", gradient_l1=0.05, gradient_l1_start=0.5, **common)
    assert plain[0]["train_loss"] == zero[0]["train_loss"]
    assert late[0]["train_loss"] != plain[0]["train_loss"]
    stored = json.loads((tmp_path / "late/results.json").read_text())[0]
    assert set(stored["bits_results"]) == {"8", "3"}
    assert (stored["gradient_l1"], stored["gradient_l1_start"]) == (0.05, 0.5)
    steps = [json.loads(line) for line in (tmp_path / "late/log.jsonl").read_text().splitlines()]
    assert all("loss" not in line or line["loss"] < 10 for line in steps)


def test_bits_of_quantized_networks(tmp_path):
    records, _ = run(tmp_path, "run", networks=("unified_int8", "lsq"), steps=2, eval_bits=(8,))
    assert set(records[0]["bits_results"]) == {"8"}
    assert records[1]["bits_results"] is None  # its weights belong to its learned steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_l1": -1.0}, "gradient_l1"),
        ({"gradient_l1": 0.1, "networks": ("fp32", "unified_int8")}, "second derivatives"),
        ({"gradient_l1_start": 0.5}, "goes with gradient_l1"),
        ({"gradient_l1": 0.1, "gradient_l1_start": 1.0, "networks": ("fp32",)}, "gradient_l1_start"),
        ({"gradient_l1": 0.1, "pack_activations": 8, "networks": ("fp32",)}, "pack_activations"),
        ({"eval_bits": (1,)}, "eval_bits"),
        ({"eval_bits": (8, 8)}, "eval_bits"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        TrainOptions(**options).resolved()
