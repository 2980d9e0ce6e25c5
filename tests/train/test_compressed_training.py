"""Pruning and sharing during a training: zeros stay, clusters move as one, and a resumed run is the same."""

from __future__ import annotations

import json
import os
import signal
from itertools import pairwise

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from gradbits.core.errors import ArgumentError, CorruptDataError, GradbitsError
from gradbits.train import Experiment, TrainOptions
from gradbits.train.checkpoint import load_checkpoint
from gradbits.train.compressing import weight_sparsity
from gradbits.train.datasets import load_data
from gradbits.train.entry import parse_entry
from gradbits.train.evaluate_file import evaluate_file
from gradbits.train.interrupt import Interrupted
from gradbits.train.log import read_log
from gradbits.train.models import build_model
from gradbits.train.network import Network, build_network
from gradbits.train.sharing import Clusters, ShareSchedule
from gradbits.train.tasks import make_task

TOTAL = 20  # pruning from step 2 to 12, sharing after step 16
SMALL = TrainOptions(
    model="small_cnn",
    model_set=("width=4",),
    networks=("fp32", "unified_int8"),
    limit=256,
    steps=TOTAL,
    log_every=5,
    save_every=3,
    threads=1,
    prune=0.75,
    share=3,
)
TIMES = ("step_ms", "step_ms_median", "seconds")


def untimed(records):
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def make(recipe="fp32", **options):
    settled = TrainOptions(model="small_cnn", model_set=("width=4",), **options).resolved()
    task = make_task(load_data("digits", limit=256), 64)
    network = build_network(parse_entry(recipe), settled, task, 0, TOTAL)
    network.model.train()
    return network, task


def weights(model):
    own = {name: p for name, p in model.named_parameters() if p.dim() >= 2 and "quantizers" not in name}
    return {name: p.detach().clone() for name, p in own.items()}


@pytest.mark.parametrize(
    ("recipe", "optimizer"), [("fp32", "sgd"), ("bf16", "adamw"), ("int8_dynamic", "adamw"), ("unified_int8", "sgd")]
)
def test_what_is_pruned_stays_zero_to_the_end(recipe, optimizer):
    network, task = make(recipe, optimizer=optimizer, lr=0.02, weight_decay=0.1, prune=0.75, share=4)
    zeros, sparsities = {}, []
    for step in range(1, TOTAL + 1):
        network.step(task.batch(0, step - 1), step)
        now = {name: weight == 0 for name, weight in weights(network.model).items()}
        for name, mask in zeros.items():
            assert bool(now[name][mask].all()), f"{name} at step {step}"
        zeros = now
        sparsities.append(weight_sparsity(network.model))
    assert sparsities[0] == 0
    assert sparsities[:12] == sorted(sparsities[:12])
    assert 0.3 < sparsities[6] < 0.75
    assert sparsities[11:] == [pytest.approx(0.75, abs=0.01)] * (TOTAL - 11)
    for name, weight in weights(network.model).items():
        assert float((weight == 0).float().mean()) == pytest.approx(0.75, abs=0.01), name
        assert weight[weight != 0].unique().numel() <= 16, name


def test_shared_weights_are_as_few_as_asked_and_are_trained():
    network, task = make(share=3)
    counts, values = [], []
    for step in range(1, TOTAL + 1):
        network.step(task.batch(0, step - 1), step)
        weight = network.model.conv3.weight.detach()
        counts.append(weight.unique().numel())
        values.append(weight.unique())
    assert counts[14] > 100
    assert counts[15:] == [8] * 5
    assert not any(torch.equal(one, other) for one, other in pairwise(values[15:19]))


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_a_cluster_moves_as_the_one_parameter_that_it_is(kind):
    make_optimizer = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
        "adam": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.01),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    }[kind]
    torch.manual_seed(0)
    model = nn.Linear(13, 7, bias=False).double()
    x, y = torch.randn(50, 13).double(), torch.randn(50, 7).double()
    optimizer = make_optimizer(model.parameters())
    schedule = ShareSchedule(model, optimizer, bits=2, begin=1)
    with torch.no_grad():
        model.weight.view(-1)[3:9] = 0.0
    loss = F.mse_loss(model(x), y)
    schedule.after_step(1)  # nothing to average in the optimizer yet, so the other one begins alike
    codes = schedule.state_dict()["codes"]["weight"].long()
    assert int(codes.max()) == 4
    book = nn.Parameter(torch.stack([model.weight[codes == k][0].detach() for k in range(1, 5)]))
    other = make_optimizer([book])
    for step in range(2, 30):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        schedule.after_step(step)
        other.zero_grad()
        table = torch.cat([book.new_zeros(1), book])
        expected = F.mse_loss(x @ table[codes].T, y)
        expected.backward()
        book.grad /= torch.bincount(codes.view(-1), minlength=5)[1:]
        other.step()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(model.weight.detach(), torch.cat([book.new_zeros(1), book.detach()])[codes])


def test_what_the_optimizer_remembers_is_shared_too():
    network, task = make(share=3, optimizer="adamw")
    for step in range(1, 18):  # shared after step 16
        network.step(task.batch(0, step - 1), step)
    codes = network.state_dict()["companions"][-1]["codes"]["conv3.weight"]
    state = network.optimizer.state[network.model.conv3.weight]
    for name in ("exp_avg", "exp_avg_sq"):
        assert state[name].unique().numel() > 1
        torch.testing.assert_close(state[name], Clusters(codes).mean(state[name]))


def test_clusters_of_every_kind():
    codes = torch.tensor([[0, 2], [2, 5]], dtype=torch.int16)
    clusters = Clusters(codes)
    assert clusters.mean(torch.tensor([[9.0, 1.0], [3.0, 4.0]])).tolist() == [[0.0, 2.0], [2.0, 4.0]]
    assert clusters.project(torch.tensor([[9.0, 1.0], [3.0, 4.0]])).tolist() == [[0.0, 1.0], [1.0, 4.0]]
    zeros = Clusters(torch.zeros(3, 1, dtype=torch.int16))
    assert zeros.mean(torch.full((3, 1), torch.inf)).tolist() == [[0.0]] * 3


def test_a_tensor_with_nan_waits_until_it_is_finite():
    model = nn.Linear(8, 8)
    schedule = ShareSchedule(model, torch.optim.SGD(model.parameters(), lr=0.1), bits=2, begin=1)
    with torch.no_grad():
        kept = model.weight[0, 0].item()
        model.weight[0, 0] = torch.nan
    schedule.after_step(1)
    assert schedule.state_dict() == {"codes": {}}
    with torch.no_grad():
        model.weight[0, 0] = kept
    schedule.after_step(2)
    assert model.weight.unique().numel() == 4


def test_a_state_that_does_not_fit_is_refused():
    network, task = make(share=3)
    for step in range(1, TOTAL + 1):
        network.step(task.batch(0, step - 1), step)
    codes = network.state_dict()["companions"][-1]["codes"]
    for wrong in (
        {"elsewhere": codes["conv1.weight"]},
        {"conv2.weight": codes["conv1.weight"]},
        {"conv1.weight": codes["conv1.weight"] + 9},
        {"conv1.weight": codes["conv1.weight"].long()},
    ):
        state = network.state_dict()
        state["companions"] = [{"codes": wrong}]
        with pytest.raises(CorruptDataError, match="codes of"):
            make(share=3)[0].load_state_dict(state)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return out, Experiment(SMALL, out=out).run()


# before the first pruning; between two; after the target; after sharing; in the second network after sharing
@pytest.mark.parametrize("count", [2, 8, 14, 18, 39])
def test_a_stopped_run_goes_on_bit_identically(tmp_path, monkeypatch, whole, count):
    out, records = whole
    real, calls = Network.step, []

    def step(self, batch, number):
        calls.append(number)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(Network, "step", step)
        with pytest.raises(Interrupted):
            Experiment(SMALL, out=tmp_path).run()
    torch.manual_seed(77)
    assert untimed(Experiment(TrainOptions(), out=tmp_path, resume=True).run()) == untimed(records)
    assert untimed(read_log(tmp_path / "log.jsonl")) == untimed(read_log(out / "log.jsonl"))
    for path in (out / "checkpoints").iterdir():
        one, other = (torch.load(p / "checkpoints" / path.name, weights_only=True)["tensors"] for p in (out, tmp_path))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    for record in records:
        one, other = (load_file(p / record["model_file"]) for p in (out, tmp_path))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_records_and_files_say_what_was_done(whole):
    out, records = whole
    assert [record["model_file"] for record in records] == [
        "models/fp32-seed0.safetensors",
        "models/unified_int8-seed0.safetensors",
    ]
    for record in records:
        assert (record["prune"], record["share"]) == (0.75, 3)
        assert record["sparsity"] == pytest.approx(0.75, abs=0.01)
        with safe_open(str(out / record["model_file"]), "pt") as file:
            metadata = file.metadata()
        assert metadata == {
            "data": "digits",
            "model": "small_cnn",
            "model_set": '["width=4"]',
            "recipe": record["network"],
            "seed": "0",
            "limit": "256",
        }
        plain = build_model("small_cnn", {"in_channels": 1, "classes": 10}, {"width": 4})
        plain.load_state_dict(load_file(out / record["model_file"]), strict=True)
        assert weight_sparsity(plain) == record["sparsity"]
    trained = load_checkpoint(out / "checkpoints" / "2-unified_int8-seed0.pt")["network"]["model"]
    assert any("quantizers" in name for name in trained)  # so that leaving them out above was worth a test
    assert evaluate_file(out / records[0]["model_file"]).value == records[0]["test_accuracy"]
    quantized = evaluate_file(out / "checkpoints" / "2-unified_int8-seed0.pt", recipe="unified_int8")
    assert quantized.value == records[1]["test_accuracy"]
    assert json.loads((out / "options.json").read_text())["options"]["share"] == 3


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_reach_the_target_too(tmp_path, steps):
    options = TrainOptions(model="mlp", networks=("fp32",), limit=128, steps=steps, threads=1, prune=0.5, share=2)
    (record,) = Experiment(options, out=tmp_path).run()
    assert record["sparsity"] == pytest.approx(0.5, abs=0.01)
    tensors = load_file(tmp_path / record["model_file"]).values()
    assert {tensor.unique().numel() for tensor in tensors if tensor.dim() == 2} <= {3, 4, 5}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"prune": 0.0}, r"prune=0\.0"),
        ({"prune": 1.0}, r"prune=1\.0"),
        ({"prune": float("nan")}, "prune=nan"),
        ({"share": 0}, "share=0: must be an integer from 1 to 8"),
        ({"share": 9}, "share=9"),
        ({"share": True}, "share=True"),
    ],
)
def test_what_is_not_legal_is_named(given, named):
    with pytest.raises(GradbitsError, match=named):
        TrainOptions(**given).resolved()


def test_a_resumed_run_is_not_shared_otherwise(whole):
    out, _ = whole
    with pytest.raises(ArgumentError, match="share=4: the run to resume was started with 3"):
        Experiment(TrainOptions(share=4), out=out, resume=True)
