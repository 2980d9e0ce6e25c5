"""What a step costs, and how it is shown."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from gradbits.core.errors import ArgumentError, CorruptDataError
from gradbits.train.datasets import load_data
from gradbits.train.entry import parse_entry
from gradbits.train.measure import MOST, WARMUP, measure
from gradbits.train.network import Network, build_network
from gradbits.train.options import TrainOptions
from gradbits.train.results import load_results, results_table, save_results
from gradbits.train.tasks import make_task

OPTIONS = TrainOptions(model="small_cnn", model_set=("width=4",)).resolved()


def test_networks_take_turns_on_the_same_batches(monkeypatch):
    task = make_task(load_data("digits", limit=300), 64)
    networks = [build_network(parse_entry(name), OPTIONS, task, 0, 10) for name in ("fp32", "bf16", "int8_dynamic")]
    turns = []
    real = Network.step

    def noted(self, batch, step):
        turns.append((self.entry.recipe, step, batch.inputs.data_ptr()))
        return real(self, batch, step)

    monkeypatch.setattr(Network, "step", noted)
    costs = measure(networks, task, 0)
    assert [cost.gradient_bits for cost in costs] == [32.0, 16.0, 8.0]
    assert all(cost.step_ms > 0 for cost in costs)
    assert costs[1].saved_bytes < costs[0].saved_bytes
    rounds = [turns[index : index + 3] for index in range(0, len(turns), 3)]
    assert WARMUP + 5 <= len(rounds) <= WARMUP + MOST
    for turn in rounds:
        assert {recipe for recipe, _, _ in turn} == {"fp32", "bf16", "int8_dynamic"}
        assert len({step for _, step, _ in turn}) == len({batch for _, _, batch in turn}) == 1
    assert {turn[0][0] for turn in rounds} == {"fp32", "bf16", "int8_dynamic"}  # each is the first one at times


def record(network, seed, accuracy, step=2.0, **more):
    values = {
        "network": network,
        "data": "digits",
        "model": "mlp",
        "steps": 5,
        "seed": seed,
        "train_loss": 0.1,
        "test_accuracy": accuracy,
        "step_ms_median": step,
        "saved_bytes": 1500,
        "gradient_bits": 8.0,
    }
    return {**values, **more}


def table_text(records):
    console = Console(width=120, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(results_table(records))
        return console.export_text()


def test_the_table_shows_mean_spread_and_the_difference_to_fp32():
    text = table_text(
        [record("fp32", 0, 0.98), record("fp32", 1, 0.96), record("int8", 0, 0.95, 3.0), record("int8", 1, 0.95, 5.0)]
    )
    assert "97.00 ± 1.41 %" in text
    assert "-2.00 pt" in text
    assert "2.00x" in text
    assert "1.50 kB" in text
    assert "2 seeds" in text


def test_the_table_works_without_fp32_and_shows_divergence():
    text = table_text([record("int8", 0, 0.1, train_loss=None), record("bf16", 0, 0.9)])
    assert "diverged" in text
    assert " pt" not in text
    text = table_text([record("fp32", 0, None, bits_per_byte=2.0), record("a", 0, None, bits_per_byte=2.1)][:1])
    assert "bits per byte" in text or "diverged" in text


def test_bits_per_byte_are_compared_in_percent():
    def text_record(network, bits):
        values = record(network, 0, None, bits_per_byte=bits)
        del values["test_accuracy"]
        return values

    text = table_text([text_record("fp32", 2.0), text_record("int8", 2.1)])
    assert "2.100" in text
    assert "+5.00 %" in text


def test_results_are_standard_json(tmp_path):
    path = tmp_path / "results.json"
    save_results(path, [record("fp32", 0, None)])
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == load_results(path)
    for content in ("[", "{}", "[1]"):
        path.write_text(content)
        with pytest.raises(CorruptDataError, match=r"results\.json"):
            load_results(path)


def test_packed_activations_train_and_are_counted():
    task = make_task(load_data("digits", limit=300), 64)
    sizes, losses = [], []
    for bits in (None, 8):
        options = TrainOptions(model="small_cnn", model_set=("width=8",), pack_activations=bits).resolved()
        network = build_network(parse_entry("fp32"), options, task, 0, 10)
        sizes.append(measure([network], task, 0)[0].saved_bytes)
        losses.append([network.step(task.batch(0, i).to(network.device), i + 1)[0] for i in range(5)])
    assert sizes[1] < 0.4 * sizes[0]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] != losses[0]


def test_illegal_packing_is_refused():
    with pytest.raises(ArgumentError, match="pack_activations=1"):
        TrainOptions(pack_activations=1).resolved()
