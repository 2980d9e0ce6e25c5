"""Whole runs: the folder, the records, and comparisons that were stopped in the middle."""

from __future__ import annotations

import dataclasses
import json
import os
import signal

import pytest
import torch
from rich.console import Console

import gradbits.train.evaluate_bits as bits_module
import gradbits.train.experiment as module
from gradbits.core.errors import ArgumentError, CorruptDataError, NonFiniteError
from gradbits.train import Experiment, TrainOptions
from gradbits.train.evaluate import has_diverged
from gradbits.train.interrupt import Interrupted
from gradbits.train.log import read_log
from gradbits.train.network import Network

SMALL = TrainOptions(
    model="small_cnn",
    model_set=("width=4",),
    networks=("fp32", "int8_dynamic", "unified_int8:gradient.bits=5"),
    seeds=(0, 1),
    limit=256,
    batch_size=64,
    steps=9,
    log_every=2,
    save_every=3,
    threads=1,
)
TINIEST = TrainOptions(model="mlp", networks=("fp32",), limit=128, steps=2, threads=1)
TIMES = ("step_ms", "step_ms_median", "seconds")


def untimed(records):
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def stop_at(monkeypatch, count):
    """Send SIGINT to this process in its ``count``-th training step."""
    real, calls = Network.step, []

    def step(self, batch, number):
        calls.append(number)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, batch, number)

    monkeypatch.setattr(Network, "step", step)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return out, Experiment(SMALL, out=out, command="gradbits train").run()


def test_a_record_says_everything(whole):
    out, records = whole
    assert json.loads((out / "results.json").read_text()) == records
    assert [(r["recipe"], r["seed"]) for r in records] == [
        (recipe, seed) for seed in (0, 1) for recipe in ("fp32", "int8_dynamic", "unified_int8")
    ]
    record = records[2]
    assert record["overrides"] == {"gradient.bits": "5"}
    # elements of a sample's gradients: the first convolution and the classifier in float, three convolutions in 5 bits
    first, middle, head = 4 * 64, 8 * 16 + 8 * 16 + 16 * 4, 10
    assert record["gradient_bits"] == pytest.approx((32 * (first + head) + 5 * middle) / (first + middle + head))
    assert (record["data"], record["model"], record["steps"], record["epochs"]) == ("digits", "small_cnn", 9, 2.25)
    assert record["command"] == "gradbits train"
    assert record["versions"]["torch"] == torch.__version__
    for key in ("train_loss", "test_accuracy", "step_ms_median", "saved_bytes", "seconds"):
        assert record[key] > 0
    assert records[1]["gradient_bits"] == 8.0


def test_the_folder_holds_everything(whole):
    out, _ = whole
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoints",
        "curves.png",
        "log.jsonl",
        "models",
        "options.json",
        "reports",
        "results.json",
    ]
    assert len(list((out / "checkpoints").iterdir())) == 6
    assert "int8_dynamic" in (out / "reports" / "2-int8_dynamic.txt").read_text()
    lines = read_log(out / "log.jsonl")
    losses = [line["step"] for line in lines if line["network"] == "fp32" and line["seed"] == 1 and "loss" in line]
    assert losses == [2, 4, 6, 8, 9]
    tests = [line["step"] for line in lines if line["network"] == "fp32" and line["seed"] == 1 and "loss" not in line]
    assert tests == [4, 8, 9]


def test_a_trained_network_is_loaded_with_plain_torch(whole):
    out, _ = whole
    content = torch.load(out / "checkpoints" / "1-fp32-seed0.pt", weights_only=True)
    assert all(type(tensor) is torch.Tensor for tensor in content["tensors"].values())


# 5: in the first network; 22: in the middle of an epoch of the third; 32: in the second seed; 60: while measuring
@pytest.mark.parametrize("count", [5, 22, 32, 60])
def test_a_stopped_comparison_goes_on_bit_identically(tmp_path, monkeypatch, whole, count):
    out, records = whole
    with monkeypatch.context() as patch:
        stop_at(patch, count)
        experiment = Experiment(SMALL, out=tmp_path, command="gradbits train")
        with pytest.raises(Interrupted):
            experiment.run()
    torch.manual_seed(77)
    again = Experiment(TrainOptions(), out=tmp_path, resume=True, command="another").run()
    assert untimed(again) == untimed(records)
    assert untimed(read_log(tmp_path / "log.jsonl")) == untimed(read_log(out / "log.jsonl"))
    for path in (out / "checkpoints").iterdir():
        one, other = (torch.load(p / "checkpoints" / path.name, weights_only=True) for p in (out, tmp_path))
        assert one["tensors"].keys() == other["tensors"].keys()
        assert all(torch.equal(one["tensors"][name], other["tensors"][name]) for name in one["tensors"])


def test_seeds_differ(whole):
    _, records = whole
    assert records[0]["train_loss"] != records[3]["train_loss"]


def test_a_finished_run_is_shown_again_and_not_repeated(tmp_path, monkeypatch):
    records = Experiment(TINIEST, out=tmp_path).run()
    monkeypatch.setattr(Network, "step", lambda *_: pytest.fail("trained again"))
    assert Experiment(TINIEST, out=tmp_path, resume=True).run() == records


def test_a_folder_is_used_only_when_that_is_meant(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    (tmp_path / "log.jsonl").write_text("old")
    with pytest.raises(ArgumentError, match="is not empty"):
        Experiment(SMALL, out=tmp_path)
    assert (tmp_path / "log.jsonl").read_text() == "old"
    with pytest.raises(ArgumentError, match="no run to resume"):
        Experiment(SMALL, out=tmp_path, resume=True)
    with pytest.raises(ArgumentError, match="overwrite"):
        Experiment(SMALL, out=tmp_path, resume=True, overwrite=True)
    with pytest.raises(ArgumentError, match="--out DIR"):
        Experiment(SMALL, resume=True)
    assert (tmp_path / "log.jsonl").read_text() == "old"
    Experiment(TINIEST, out=tmp_path, overwrite=True).run()
    assert (tmp_path / "mine.txt").read_text() == "keep"
    assert "old" not in (tmp_path / "log.jsonl").read_text()
    with pytest.raises(ArgumentError, match="is a file"):
        Experiment(SMALL, out=tmp_path / "mine.txt", overwrite=True)


def test_options_are_checked_before_a_folder_is_touched(tmp_path):
    (tmp_path / "log.jsonl").write_text("old")
    with pytest.raises(ArgumentError, match="lr=-1"):
        Experiment(TrainOptions(lr=-1.0), out=tmp_path, overwrite=True)
    with pytest.raises(ArgumentError, match="lr=-1"):
        Experiment(TrainOptions(lr=-1.0), out=tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_fresh_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in ("001", "002"):
        experiment = Experiment(TINIEST)
        with pytest.raises(ArgumentError, match="not begun"):
            experiment.folder()
        experiment.run()
        assert experiment.folder().root.name == f"{number}-digits-mlp"
    with pytest.raises(ArgumentError, match="int9"):
        Experiment(dataclasses.replace(TINIEST, networks=("int9",))).run()
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["001-digits-mlp", "002-digits-mlp"]


@pytest.mark.parametrize(
    ("networks", "named"),
    [
        (("fp32", "int9"), "'int9'"),
        (("fp32", "int8_dynamic:gradient.colour=5"), "colour"),
        (("fp32", "int8_dynamic:gradient.bits=77"), "77"),
    ],
)
def test_a_wrong_entry_is_refused_before_the_first_step(tmp_path, monkeypatch, networks, named):
    monkeypatch.setattr(Network, "step", lambda *_: pytest.fail("trained"))
    (tmp_path / "log.jsonl").write_text("old")
    with pytest.raises(ArgumentError, match=named):
        Experiment(TrainOptions(networks=networks, steps=3), out=tmp_path, overwrite=True).run()
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_changed_data_is_noticed(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(bytes(range(200)) * 20)
    options = TrainOptions(
        text=str(path),
        model_set=("d_model=8", "heads=1", "layers=1", "context=8"),
        networks=("fp32",),
        steps=2,
        batch_size=2,
    )
    Experiment(options, out=tmp_path / "run").run()
    path.write_bytes(bytes(range(200)) * 20 + b"x")
    with pytest.raises(CorruptDataError, match="data 'text': is not what the run"):
        Experiment(options, out=tmp_path / "run", resume=True).run()


@pytest.mark.parametrize("content", ["", "[]", '{"format": "other"}', '{"format": "gradbits-run", "version": 2}'])
def test_damaged_options_are_named(tmp_path, content):
    (tmp_path / "options.json").write_text(content)
    with pytest.raises(CorruptDataError, match=r"options\.json"):
        Experiment(SMALL, out=tmp_path, resume=True)


def test_without_matplotlib_the_run_says_so_and_goes_on(tmp_path, monkeypatch, capsys):
    from rich.console import Console

    from gradbits.core.errors import MissingDependencyError

    def missing(*_, **__):
        raise MissingDependencyError("curves need matplotlib")

    monkeypatch.setattr(module, "draw_log", missing)
    Experiment(TINIEST, out=tmp_path, console=Console()).run()
    assert "no curves.png: curves need matplotlib" in capsys.readouterr().out
    assert (tmp_path / "results.json").is_file()


def test_handlers_and_threads_are_put_back(tmp_path):
    handler, threads = signal.getsignal(signal.SIGINT), torch.get_num_threads()
    options = TrainOptions(model="mlp", networks=("fp32",), limit=128, steps=2, threads=threads + 1)
    Experiment(options, out=tmp_path).run()
    assert signal.getsignal(signal.SIGINT) is handler
    assert torch.get_num_threads() == threads


def test_a_diverged_network_is_a_result_and_ends_no_run(tmp_path, monkeypatch, capsys):
    """A network whose parameters are no numbers may refuse whatever is asked of it; the others go on."""

    def refusing(real, refuses):
        def wrapped(first, *args, **kwargs):
            if any(refuses(each) for each in (first if isinstance(first, list) else [first])):
                raise NonFiniteError("real=[nan]: must be finite")
            return real(first, *args, **kwargs)

        return wrapped

    def is_qat(network):
        return network.entry.recipe == "qat_int8"

    monkeypatch.setattr(module, "measure", refusing(module.measure, is_qat))
    monkeypatch.setattr(module, "measure_variances", refusing(module.measure_variances, is_qat))
    refused = refusing(bits_module.evaluate_bits, has_diverged)
    monkeypatch.setattr(bits_module, "evaluate_bits", refused)
    real = Network.forward

    def forward(self, batch, module=None):
        if self.entry.recipe == "qat_int8" and not self.model.training:
            raise NonFiniteError("real=[nan]: must be finite")
        return real(self, batch, module)

    monkeypatch.setattr(Network, "forward", forward)
    networks = ("fp32", "qat_int8", "int8_dynamic")
    given = {"lr": 1e30, "eval_bits": (8, 4), "measure_variance": True, "draws": 3}
    options = dataclasses.replace(TINIEST, networks=networks, **given)
    records = Experiment(options, out=tmp_path, console=Console(width=120)).run()
    assert json.loads((tmp_path / "results.json").read_text()) == records
    diverged = records[1]
    assert diverged["test_accuracy"] is None
    assert diverged["bits_results"] == {"8": None, "4": None}
    assert diverged["step_ms_median"] is None
    assert records[0]["step_ms_median"] > 0
    assert records[2]["step_ms_median"] > 0
    shown = capsys.readouterr().out
    assert shown.count("diverged") >= 4
    assert "nan" not in shown.partition("vs fp32")[2].partition("qat_int8")[2].partition("\n")[0]


def test_a_network_that_is_finite_and_refuses_is_an_error(tmp_path, monkeypatch):
    real = Network.forward

    def forward(self, batch, module=None):
        if not self.model.training:
            raise ArgumentError("a: wrong")
        return real(self, batch, module)

    monkeypatch.setattr(Network, "forward", forward)
    experiment = Experiment(TINIEST, out=tmp_path)
    with pytest.raises(ArgumentError, match="a: wrong"):
        experiment.run()
