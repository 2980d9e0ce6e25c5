"""OneBitAdam after the freeze, and what both optimizers that talk to other ranks do with their surroundings."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gradbits.core.errors import ArgumentError, CorruptDataError, DtypeError, GradbitsError, UnsupportedError
from gradbits.optim import OneBitAdam, QuantizedAdam
from gradbits.train.digits import load_digits
from gradbits.train.models.mlp import mlp
from gradbits.train.tasks import ImageTask

sys.path.insert(0, str(Path(__file__).parent.parent / "wire"))
from ranks import run_ranks

BOTH = pytest.mark.parametrize("kind", [QuantizedAdam, OneBitAdam])
SHAPE = (48, 40)


def weights(seed=0):
    torch.manual_seed(seed)
    return nn.Parameter(torch.randn(SHAPE) * 0.1), nn.Parameter(torch.randn(7))


def one_step(optimizer, parameters, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def content(optimizer):
    return copy.deepcopy(optimizer.state_dict())


def assert_equal(first, second):
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first.keys() - {"seconds"}:
            assert_equal(first[key], second[key])
    else:
        assert first == second


def test_digits_go_on_training_after_the_freeze():
    task = ImageTask(load_digits(), 64)
    torch.manual_seed(0)
    model = mlp(**task.model_arguments())
    optimizer = OneBitAdam(model.named_parameters(), lr=1e-3, freeze_step=20)
    for step in range(60):
        batch = task.batch(0, step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch.inputs), batch.targets)
        loss.backward()
        optimizer.step()
        assert loss < (3 if step < 20 else 0.7)
    assert loss < 0.2
    assert optimizer.skipped == 0


@pytest.mark.parametrize("freeze_step", [1, 2])
@pytest.mark.parametrize("lr", [1e-3, 1e-2])
def test_a_short_warm_up_does_not_run_away(freeze_step, lr):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
    optimizer = OneBitAdam(model.named_parameters(), lr=lr, freeze_step=freeze_step, min_elements=100)
    inputs = torch.randn(256, 20)
    targets = inputs[:, :5].argmax(1)
    for _ in range(200):
        rows = torch.randint(256, (32,))
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs[rows]), targets[rows])
        loss.backward()
        optimizer.step()
        assert loss < 10
        for p, old in zip(model.parameters(), before, strict=True):
            assert (p - old).abs().max() <= 7.27 * lr * 1.01
    assert optimizer.skipped == 0


def test_the_limit_is_none_in_the_warm_up_and_an_option():
    w, _ = weights()
    w.grad = torch.zeros(SHAPE)
    optimizer = OneBitAdam([w], lr=1.0, freeze_step=1, clip=0.5)
    assert OneBitAdam([w], clip=math.inf).clip == math.inf
    w.grad.fill_(1.0)
    old = w.detach().clone()
    optimizer.step()  # m / sqrt(v) = 0.1 / sqrt(0.001) = 3.16
    assert torch.allclose(old - w, torch.tensor(3.1623), rtol=1e-3)
    old = w.detach().clone()
    optimizer.step()
    assert torch.allclose(old - w, torch.tensor(0.5))
    for clip in (0.0, -1.0, math.nan, "all", True):
        with pytest.raises(GradbitsError, match="clip="):
            OneBitAdam([w], clip=clip)
    for betas in (None, 0.9, (0.9,)):
        with pytest.raises(DtypeError, match="betas="):
            OneBitAdam([w], betas=betas)


def test_a_gradient_whose_square_is_not_finite_changes_nothing():
    w, b = weights()
    optimizer = OneBitAdam([w, b], lr=0.01)
    one_step(optimizer, (w, b))
    old, before = w.detach().clone(), content(optimizer)
    w.grad[0, 0] = 1e30
    optimizer.step()
    assert optimizer.skipped == 1
    assert torch.equal(w, old)
    assert_equal(before["state"], content(optimizer)["state"])


@BOTH
def test_frozen_parameters_are_left_alone(kind):
    w, b = weights()
    frozen = nn.Parameter(torch.randn(SHAPE), requires_grad=False)
    at = frozen.detach().clone()
    optimizer = kind([("f", frozen), ("w", w), ("b", b)], lr=0.1, weight_decay=0.5)
    assert torch.equal(frozen, at)
    one_step(optimizer, (w, b))
    assert torch.equal(frozen, at)
    assert frozen not in optimizer.state
    # the numbers of a stored state are PyTorch's, frozen ones counted
    optimizer.load_state_dict(content(optimizer))
    optimizer.load_ranks([content(optimizer)])
    with pytest.raises(ArgumentError, match="requires a gradient"):
        kind([frozen])


@BOTH
@pytest.mark.parametrize("freeze_step", [1, 100])
def test_a_parameter_without_gradient_waits(kind, freeze_step):
    w, b = weights()
    options = {"freeze_step": freeze_step} if kind is OneBitAdam else {}
    optimizer = kind([("w", w), ("b", b)], lr=0.1, weight_decay=0.5, **options)
    one_step(optimizer, (w, b))
    one_step(optimizer, (w, b), seed=2)
    b_at = b.detach().clone()
    w_at, before = w.detach().clone(), content(optimizer)
    w.grad, b.grad = None, torch.ones(7)
    optimizer.step()
    assert torch.equal(w, w_at)
    assert not torch.equal(b, b_at)
    assert_equal(before["state"][0], content(optimizer)["state"][0])
    if kind is OneBitAdam:
        assert_equal(before["wire"]["residual"], content(optimizer)["wire"]["residual"])
    # frozen later, with an old gradient
    w.grad = torch.ones(SHAPE)
    w.requires_grad_(False)
    optimizer.step()
    assert torch.equal(w, w_at)


@BOTH
@pytest.mark.parametrize("params", [[], "abc", None, 3, [1], [{}], [{"params": "ab"}], torch.zeros(3), [("a", 1)], {}])
def test_params_that_are_none(kind, params):
    with pytest.raises((ArgumentError, DtypeError), match=r"params.*must be parameters"):
        kind(params)


@BOTH
def test_params_that_cannot_be_trained(kind):
    w, b = weights()
    with pytest.raises(ArgumentError, match="two parameters are named 'a'"):
        kind([("a", w), ("a", b)])
    with pytest.raises(ArgumentError, match=r"params: .*leaf"):
        kind([w * 2])
    with pytest.raises(DtypeError, match="complex64"):
        kind([nn.Parameter(torch.zeros(3, dtype=torch.complex64))])
    with pytest.raises(GradbitsError, match="lr="):
        kind([{"params": w, "lr": "fast"}])
    kind([{"params": w}, {"params": iter([b])}])


@BOTH
def test_sparse_gradients_are_refused(kind):
    embedding = nn.Embedding(50, 30, sparse=True)
    w, _ = weights()
    optimizer = kind([("w", w), ("embedding.weight", embedding.weight)])
    before = content(optimizer)
    w.grad = torch.ones(SHAPE)
    embedding(torch.tensor([3])).sum().backward()
    with pytest.raises(UnsupportedError, match=r"embedding\.weight\.grad.*dense"):
        optimizer.step()
    assert_equal(before, content(optimizer))


@BOTH
def test_damaged_states_are_refused_and_change_nothing(kind):
    w, b = weights()
    optimizer = kind([("w", w), ("b", b)], lr=0.01)
    one_step(optimizer, (w, b))
    before, at = content(optimizer), w.detach().clone()
    other = nn.Parameter(w.detach().clone()), nn.Parameter(b.detach().clone())
    adam = torch.optim.Adam(other)
    one_step(adam, other)

    def broken(*path, value=None):
        state = content(optimizer)
        inner = state
        for key in path[:-1]:
            inner = inner[key]
        if value is None:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value
        return state

    damaged = [
        {},
        adam.state_dict(),
        broken("state"),
        broken("param_groups"),
        broken("param_groups", value=[]),
        broken("param_groups", value=[3]),
        broken("param_groups", 0, "lr"),
        broken("param_groups", 0, "lr", value="fast"),
        broken("param_groups", 0, "params", value=[0]),
        broken("wire"),
        broken("wire", value=7),
        broken("wire", "step"),
        broken("wire", "skipped", value="none"),
        broken("state", 1),
        broken("state", 0, "m"),
        broken("state", 0, "v", value=3),
        broken("state", 0, "m", value=torch.zeros(3)),
        broken("state", 0, "m", value=torch.zeros(SHAPE, dtype=torch.int64)),
    ]
    if kind is OneBitAdam:
        damaged += [
            broken("wire", "residual"),
            broken("wire", "residual", value=3),
            broken("wire", "owned", "w"),
            broken("wire", "seconds"),
            broken("wire", "codec_state", value=3),
        ]
    else:
        damaged += [broken("state", 0, "x"), broken("state", 0, "x", value=torch.zeros(4))]
    for state in damaged:
        for load in (optimizer.load_state_dict, lambda state: optimizer.load_ranks([state])):
            with pytest.raises((ArgumentError, CorruptDataError)):
                load(state)
            assert_equal(before, content(optimizer))
    for nothing in (None, 3, "state", [before]):
        with pytest.raises(DtypeError, match=r"state_dict=.*must be what state_dict"):
            optimizer.load_state_dict(nothing)
    for nothing in (None, before, "states"):
        with pytest.raises(DtypeError, match=r"states=.*must be the list"):
            optimizer.load_ranks(nothing)
    with pytest.raises(ArgumentError, match=r"states=\[\]"):
        optimizer.load_ranks([])
    with pytest.raises(DtypeError, match="states=None"):
        optimizer.load_ranks([None])
    with pytest.raises((ArgumentError, CorruptDataError)):
        optimizer.load_ranks([before, before])  # twice rank 0 of 1
    assert_equal(before, content(optimizer))
    assert torch.equal(w, at)


@BOTH
@pytest.mark.parametrize("unscale", [False, True])
def test_a_scaler_changes_nothing_but_the_scale(kind, unscale):
    (w, b), (again_w, again_b) = weights(), weights()
    plain, scaled = kind([w, b], lr=0.01), kind([again_w, again_b], lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for seed in range(3):
        one_step(plain, (w, b), seed)
        generator = torch.Generator().manual_seed(seed)
        scaled.zero_grad()
        gradients = [torch.randn(p.shape, generator=generator) for p in (again_w, again_b)]
        loss = sum((p * g).sum() for p, g in zip((again_w, again_b), gradients, strict=True))
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(scaled)
        scaler.step(scaled)
        scaler.update()
        assert torch.equal(w, again_w)
        assert torch.equal(b, again_b)
        assert torch.equal(again_w.grad, gradients[0])
    again_w.grad = torch.full(SHAPE, math.inf)
    scaler.step(scaled)
    scaler.update()
    assert torch.equal(w, again_w)
    assert (scaled.skipped, scaler.get_scale()) == (1, 512.0)


RANKS = """
from gradbits.core.errors import ArgumentError
from gradbits.optim import OneBitAdam, QuantizedAdam


def main(rank, world):
    for kind, options in ((QuantizedAdam, {}), (OneBitAdam, {"freeze_step": 2})):
        # unequal starts, of several dtypes, and one frozen parameter, which stays each rank's own
        torch.manual_seed(rank)
        model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 33), nn.ReLU(), nn.Linear(33, 5))
        half = nn.Parameter(torch.randn(9).bfloat16())
        frozen = nn.Parameter(torch.randn(30), requires_grad=False)
        own = frozen.detach().clone()
        named = [*model.named_parameters(), ("half", half), ("frozen", frozen)]
        optimizer = kind(named, lr=0.01, min_elements=100, weight_decay=0.1, **options)
        assert optimizer.comm.bytes_sent == 0
        assert equal_everywhere(flat(model)), kind
        assert equal_everywhere(half.detach().float()), kind
        assert torch.equal(frozen, own)

        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in range(6):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, rank, step)).backward()
            if step in (1, 4) and rank == 1:
                model[0].weight.grad[0, 0] = float("inf")
            if step == 3 and rank == 1:
                model[2].weight.grad = None  # on this rank only: the others' gradient counts
            at, taken = flat(model), optimizer.comm.step
            half_at = half.detach().clone()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(flat(model), at) == (step in (1, 4)), (kind, step)
            assert optimizer.comm.step == taken + (step not in (1, 4))
            assert torch.equal(half, half_at)  # no gradient anywhere
            assert equal_everywhere(flat(model)), (kind, step)
        assert optimizer.skipped == 2
        assert scaler.get_scale() == (2.0**8 if rank == 1 else 2.0**10)

        # not the same parameters on every rank
        for given in (torch.zeros(3 + rank), torch.zeros(3, dtype=[torch.float32, torch.float64][rank])):
            try:
                kind([nn.Parameter(given)])
            except ArgumentError:
                continue
            raise AssertionError(kind)
"""


def test_unequal_starts_and_a_scaler_on_two_ranks(tmp_path):
    run_ranks(tmp_path, RANKS)
