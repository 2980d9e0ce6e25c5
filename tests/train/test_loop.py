"""The loop: a run that was stopped anywhere and resumed is bit for bit the run that was not."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console

from gradbits.core.errors import CorruptDataError
from gradbits.train.datasets import load_data
from gradbits.train.entry import parse_entry
from gradbits.train.evaluate import evaluate
from gradbits.train.interrupt import Interrupted, StopRequest
from gradbits.train.log import Log, read_log
from gradbits.train.loop import Plan, restore, train
from gradbits.train.network import build_network
from gradbits.train.options import TrainOptions
from gradbits.train.progress import make_reporter
from gradbits.train.tasks import make_task

TOTAL = 24
PLAN = Plan(seed=3, total=TOTAL, test_every=10, log_every=4, save_every=7)
IDENTITY = {"network": "it", "steps": TOTAL}
SETTINGS = {
    "mlp": TrainOptions(model="mlp", model_set=("width=16",), optimizer="adamw", lr=0.01),
    "small_cnn": TrainOptions(model="small_cnn", model_set=("width=4",)),
    "gpt": TrainOptions(model="gpt", model_set=("d_model=16", "layers=1", "heads=2", "context=16"), batch_size=4),
}


class StopAt(StopRequest):
    """Asks for a stop the ``count``-th time it is looked at."""

    def __init__(self, count=None):
        super().__init__()
        self.left = count

    def check(self):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Interrupted(2)


class Counter:
    """A companion that moves the weights by a state of its own, so that a lost state shows."""

    def __init__(self, model):
        self.model, self.total = model, torch.zeros(())

    def after_step(self, step):
        self.total += step
        with torch.no_grad():
            next(self.model.parameters()).add_(1e-4 * self.total)

    def state_dict(self):
        return {"total": self.total}

    def load_state_dict(self, state):
        self.total = state["total"].clone()


def make(name, recipe, companion=False):
    options = SETTINGS[name].resolved()
    data = load_data("pydoc" if name == "gpt" else "digits", limit=20_000 if name == "gpt" else 600)
    if name == "gpt":
        data = type(data)(name="pydoc", train=data.train, test=data.test[:500])
    task = make_task(data, options.batch_size, 16)
    network = build_network(parse_entry(recipe), options, task, seed=3, total_steps=TOTAL)
    if companion:
        network.companions.append(Counter(network.model))
    return network, task


def fresh(folder, name, recipe, stop, companion=False):
    network, task = make(name, recipe, companion)
    with Log(folder / "log.jsonl") as log:
        return network, go(network, task, folder, log, stop)


def resumed(folder, name, recipe, stop, companion=False):
    network, task = make(name, recipe, companion)
    torch.manual_seed(12345)  # whatever happened in between
    position = restore(network, folder / "a.pt", IDENTITY)
    with Log(folder / "log.jsonl", keep=position.log_bytes) as log:
        return network, go(network, task, folder, log, stop, position)


def go(network, task, folder, log, stop, position=None):
    return train(
        network,
        task,
        PLAN,
        checkpoint=folder / "a.pt",
        log=log,
        reporter=make_reporter(Console(quiet=True)),
        stop=stop,
        identity=IDENTITY,
        position=position,
    )


def untimed(path):
    return [{key: value for key, value in line.items() if key != "step_ms"} for line in read_log(path)]


def same_state(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("mlp", "fp32"),
        ("small_cnn", "bf16"),
        ("small_cnn", "int8_dynamic"),
        ("small_cnn", "unified_int8:gradient.bits=5"),
        ("gpt", "fp32"),
        ("gpt", "int8_dynamic"),
    ],
)
@pytest.mark.parametrize("stops", [[13], [0, 4, 7, 11]])
def test_a_resumed_run_is_bit_identical(tmp_path, name, recipe, stops):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    network, end = fresh(whole, name, recipe, StopRequest())
    with pytest.raises(Interrupted):
        fresh(broken, name, recipe, StopAt(stops[0]))
    for count in stops[1:]:
        with pytest.raises(Interrupted):
            resumed(broken, name, recipe, StopAt(count))
    again, end_again = resumed(broken, name, recipe, StopRequest())
    assert same_state(network.state_dict(), again.state_dict())
    assert (end.metric, end.final_loss, end.step) == (end_again.metric, end_again.final_loss, end_again.step)
    assert untimed(whole / "log.jsonl") == untimed(broken / "log.jsonl")


def test_a_killed_run_goes_on_from_the_latest_checkpoint(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    network, _ = fresh(whole, "small_cnn", "int8_dynamic", StopRequest())

    class Killed(StopAt):
        def check(self):
            try:
                super().check()
            except Interrupted:
                raise MemoryError from None  # nothing is saved on the way out

    with pytest.raises(MemoryError):
        fresh(broken, "small_cnn", "int8_dynamic", Killed(19))
    again, _ = resumed(broken, "small_cnn", "int8_dynamic", StopRequest())
    assert same_state(network.state_dict(), again.state_dict())
    assert untimed(whole / "log.jsonl") == untimed(broken / "log.jsonl")


def test_companions_are_resumed_too(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    network, _ = fresh(whole, "mlp", "fp32", StopRequest(), companion=True)
    with pytest.raises(Interrupted):
        fresh(broken, "mlp", "fp32", StopAt(9), companion=True)
    again, _ = resumed(broken, "mlp", "fp32", StopRequest(), companion=True)
    assert network.companions[0].total == sum(range(1, TOTAL + 1))
    assert same_state(network.state_dict(), again.state_dict())


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        fresh(tmp_path, "mlp", "fp32", StopAt(3))
    with pytest.raises(CorruptDataError, match=r"a\.pt: belongs to a run with network='it', not 'other'"):
        restore(make("mlp", "fp32")[0], tmp_path / "a.pt", {"network": "other"})
    with pytest.raises(CorruptDataError, match=r"a\.pt: does not fit network 'fp32'"):
        restore(make("small_cnn", "fp32")[0], tmp_path / "a.pt", IDENTITY)


def test_every_recipe_begins_with_the_same_weights_and_learns():
    weights = []
    for recipe in ("fp32", "bf16", "int8_dynamic", "unified_int8"):
        network, task = make("small_cnn", recipe)
        weights.append(torch.cat([p.detach().flatten() for p in network.model.parameters()]))
        network.model.train()
        losses = [network.step(task.batch(3, step), step + 1)[0] for step in range(TOTAL)]
        assert sum(losses[-4:]) < 0.6 * sum(losses[:4]), recipe
    assert all(torch.equal(each, weights[0]) for each in weights)


def test_testing_does_not_change_the_training():
    network, task = make("small_cnn", "int8_dynamic")
    before = {key: value.clone() for key, value in network.model.state_dict().items()}
    state = torch.get_rng_state()
    first, second = (evaluate(network, task, 3) for _ in range(2))
    assert first == second
    assert torch.equal(state, torch.get_rng_state())
    assert same_state(before, dict(network.model.state_dict()))
    assert network.model.training


def test_the_test_accuracy_is_the_share_of_right_answers():
    network, task = make("mlp", "fp32")
    with torch.no_grad():
        for parameter in network.model.parameters():
            parameter.zero_()
        list(network.model.parameters())[-1][4] = 1.0  # always answers 4
    assert evaluate(network, task, 0) == (task.data.test_labels == 4).sum().item() / 360


def test_a_uniform_guess_costs_eight_bits_per_byte():
    network, task = make("gpt", "fp32")
    with torch.no_grad():
        network.model.head.weight.zero_()
    assert evaluate(network, task, 0) == pytest.approx(8.0, abs=1e-5)


def test_the_cosine_schedule_rises_and_falls_to_zero():
    network, task = make("mlp", "fp32")
    rates = []
    for step in range(TOTAL):
        rates.append(network.optimizer.param_groups[0]["lr"])
        network.step(task.batch(0, step), step + 1)
    assert rates[0] == pytest.approx(0.005)
    assert max(rates) == rates[2] == pytest.approx(0.01)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert network.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


def test_the_log_cuts_back_and_refuses_to_grow_from_nothing(tmp_path):
    path = tmp_path / "log.jsonl"
    with Log(path, common={"network": "fp32"}) as log:
        log.write(step=1, loss=float("nan"))
        size = log.size()
        log.write(step=2, loss=0.5)
    assert json.loads(path.read_text().splitlines()[0]) == {"network": "fp32", "step": 1, "loss": None}
    with Log(path, keep=size) as log:
        log.write(step=3)
    assert [line["step"] for line in read_log(path)] == [1, 3]
    with pytest.raises(CorruptDataError, match=r"log\.jsonl: is \d+ bytes long"):
        Log(path, keep=10_000)
    path.write_text('{"step": 1}\nhalf of a li')
    with pytest.raises(CorruptDataError, match="line 2 is not JSON"):
        read_log(path)
