"""``--measure-variance``: what is measured after a training, shown and written."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
from rich.console import Console

from gradbits.core.errors import ArgumentError
from gradbits.observe.variance import GradientNoise, VarianceReport
from gradbits.train import Experiment, TrainOptions
from gradbits.train.interrupt import Interrupted, StopRequest
from gradbits.train.network import Network
from gradbits.train.variance import measure_variances, variance_table

OPTIONS = TrainOptions(
    model="small_cnn",
    model_set=("width=4",),
    networks=("fp32", "statquant_ptq", "statquant_psq:grad_input.gradient.bits=4"),
    seeds=(3, 4),
    limit=128,
    batch_size=64,
    steps=3,
    threads=1,
    measure_variance=True,
    draws=12,
)
LAYERS = ["conv1", "conv2", "conv3", "conv4", "head"]


def shown(**options):
    """Run and return everything that was printed."""
    console = Console(file=io.StringIO(), width=120)
    Experiment(console=console, **options).run()
    return console.file.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("variance") / "run"
    return out, shown(options=OPTIONS, out=out)


def test_every_layer_of_every_quantized_network_is_measured(whole):
    out, text = whole
    content = json.loads((out / "variance.json").read_text())
    assert (content["seed"], content["step"]) == (3, 3)
    assert [each["network"] for each in content["networks"]] == list(OPTIONS.networks[1:])
    for each in content["networks"]:
        assert (each["draws"], each["scope"]) == (12, "layer")
        assert sorted({row["layer"] for row in each["rows"]}) == LAYERS
        assert {row["layer"] for row in each["rows"] if row["product"] == "grad_input"} == set(LAYERS[1:])
        for row in each["rows"]:
            assert 0 < row["variance"] < 2 * row["bound"]
            assert row["variance"] == pytest.approx(row["predicted"], rel=0.7)
            assert row["bias_z"] < 8
    four_bits, eight_bits = (
        {row["layer"]: row["variance"] for row in each["rows"] if row["product"] == "grad_input"}
        for each in reversed(content["networks"])
    )
    assert all(four_bits[layer] > 10 * eight_bits[layer] for layer in four_bits)
    assert (out / "variance.png").read_bytes().startswith(b"\x89PNG")
    assert "12 draws, noise of each layer alone" in text
    assert "noise of the gradients, summed over the layers" in text


def test_measuring_changes_no_other_number(whole, tmp_path):
    out, _ = whole
    plain = dataclasses.replace(OPTIONS, measure_variance=None, draws=None)
    records = Experiment(plain, out=tmp_path).run()
    keys = ("network", "seed", "train_loss", "test_accuracy", "saved_bytes", "gradient_bits")
    assert [[r[k] for k in keys] for r in records] == [
        [r[k] for k in keys] for r in json.loads((out / "results.json").read_text())
    ]
    assert not (tmp_path / "variance.json").exists()


def test_a_finished_run_may_be_asked_later(whole, tmp_path, monkeypatch):
    out, _ = whole
    plain = dataclasses.replace(OPTIONS, measure_variance=None, draws=None, seeds=(3,))
    Experiment(plain, out=tmp_path).run()
    monkeypatch.setattr(Network, "step", lambda *_: pytest.fail("trained again"))
    shown(options=TrainOptions(measure_variance=True, draws=12), out=tmp_path, resume=True)
    assert (tmp_path / "variance.json").read_bytes() == (out / "variance.json").read_bytes()
    before = (out / "variance.json").read_bytes()
    shown(options=TrainOptions(), out=out, resume=True)
    assert (out / "variance.json").read_bytes() == before
    with pytest.raises(ArgumentError, match="draws=5"):
        Experiment(TrainOptions(measure_variance=True, draws=5), out=out, resume=True)


def test_a_new_run_in_the_folder_removes_it(tmp_path):
    (tmp_path / "variance.json").write_text("old")
    (tmp_path / "variance.png").write_text("old")
    Experiment(
        TrainOptions(model="mlp", networks=("fp32",), limit=128, steps=1, threads=1), out=tmp_path, overwrite=True
    ).run()
    assert not (tmp_path / "variance.json").exists()
    assert not (tmp_path / "variance.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"networks": ("fp32", "bf16"), "measure_variance": True}, "measure_variance=True"),
        ({"draws": 8}, "measure_variance"),
        ({"measure_variance": True, "draws": 2}, "draws=2"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        TrainOptions(**options).resolved()


def test_a_stop_is_heeded_between_networks(monkeypatch):
    stop = StopRequest()
    stop.signal = 2
    monkeypatch.setattr("gradbits.train.variance.measure_variance", lambda *_, **__: pytest.fail("went on"))
    with pytest.raises(Interrupted):
        next(measure_variances([object()], None, 3, stop))


def test_the_table_adds_up_the_layers():
    def row(product, size, variance, bound, z):
        return GradientNoise("layer", product, size, variance, 0.0, z, variance, bound)

    report = VarianceReport(
        "layer", 3, (row("grad_input", 1.0, 0.5, 1.0, -9.0), row("grad_input", 3.0, 1.5, 2.0, 2.0))
    )
    table = variance_table({"one": report, "empty": VarianceReport("layer", 3, ())})
    cells = [list(column.cells) for column in table.columns]
    assert cells == [["one", "empty"], ["0.5", "-"], ["0.75", "-"], ["-", "-"], ["-", "-"], ["2.0", "-"]]
