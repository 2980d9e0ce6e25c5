"""QuantizedAdam and OneBitAdam: the identities of the method, on one process and on several."""

from __future__ import annotations

import copy
import io
import sys
from pathlib import Path

import pytest
import torch

from gradbits.core.errors import ArgumentError, GradbitsError
from gradbits.optim import OneBitAdam, QuantizedAdam
from gradbits.wire import codec
from gradbits.wire.methods.log_grid import LogGrid
from gradbits.wire.methods.uniform_grid import UniformGrid

sys.path.insert(0, str(Path(__file__).parent.parent / "wire"))
from ranks import run_ranks

SHAPE = (48, 40)


def start(**options):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(SHAPE) * 0.1)
    return weight, QuantizedAdam([("weight", weight)], **options)


def steps(weight, optimizer, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        weight.grad = torch.randn(SHAPE, generator=generator) + weight.detach()
        optimizer.step()


def test_the_sum_rule_and_the_telescoping_identity():
    weight, optimizer = start(lr=0.01)
    state = optimizer.state[weight]
    m, v = torch.zeros(SHAPE, dtype=torch.float64), torch.full(SHAPE, 1e-8, dtype=torch.float64)
    wanted, begin = torch.zeros(SHAPE, dtype=torch.float64), state["x"].clone().double()
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        weight.grad = torch.randn(SHAPE, generator=generator)
        g = weight.grad.double()
        v, m = 0.999 * v + 0.001 * g * g, 0.9 * m + 0.1 * g
        wanted += 0.01 * m / v.sqrt()
        optimizer.step()
    # x - e is where exact Adam would be; what was applied plus what waits is what was wanted
    assert state["e"].abs().max() > 1e-4
    moved = begin.view(SHAPE) - state["x"].double().view(SHAPE)
    assert torch.allclose(moved + state["e"].double(), wanted, rtol=1e-5, atol=1e-6)


def test_without_quantizers_it_is_generic_adam():
    weight, optimizer = start(lr=0.01, update=None, weight=None, weight_decay=0.1)
    x = weight.detach().clone()
    m, v = torch.zeros(SHAPE), torch.full(SHAPE, 1e-8)
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        g = torch.randn(SHAPE, generator=generator)
        weight.grad = g.clone()
        v, m = 0.999 * v + (1 - 0.999) * g * g, 0.9 * m + (1 - 0.9) * g
        x = (1 - 0.01 * 0.1) * x - 0.01 * m / v.sqrt()
        optimizer.step()
    assert not optimizer.state[weight]["e"].any()
    assert torch.allclose(weight, x, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("k", [0, 2, 14])
def test_the_log_grid_contracts(k):
    grid = LogGrid(k=k)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        u = torch.randn(200, generator=generator).sign() * torch.rand(200, generator=generator) ** (1 + seed)
        q = grid.decode(grid.encode(u))
        assert (u - q).norm() <= (1 - 1 / 200) ** 0.5 * u.norm()
        assert torch.equal(grid.decode(grid.encode(q)), q)
        assert torch.equal(grid.decode(grid.encode(-u)), -q)
        assert torch.equal(grid.decode(grid.encode(u * 8)), q * 8)
        assert q[u.abs().argmax()] == u[u.abs().argmax()]
        assert q.unique().numel() <= 2 * (k + 1) + 1
        inner = u.abs() >= u.abs().max() * 2.0**-k
        assert ((u - q).abs() <= u.abs() / 3 * (1 + 1e-6))[inner].all()
    assert not grid.decode(grid.encode(torch.zeros(5))).any()
    # ties go to the larger magnitude
    assert LogGrid(k=1).decode(LogGrid(k=1).encode(torch.tensor([1.0, 0.75, 0.25, -0.25]))).tolist() == [
        1,
        1,
        0.5,
        -0.5,
    ]


@pytest.mark.parametrize("k", [0, 3, 6, 7, 14])
@pytest.mark.parametrize("clip_range", [0.5, None])
def test_the_uniform_grid(k, clip_range):
    grid = UniformGrid(k=k, clip_range=clip_range)
    x = torch.linspace(-0.5, 0.5, 4001)
    q = grid.decode(grid.encode(x))
    assert (x - q).abs().max() <= 2.0 ** -(k + 2) * (1 + 1e-5)
    assert torch.equal(grid.decode(grid.encode(q)), q)
    assert q.unique().numel() == min(2 ** (k + 1) + 1, 4001) or k == 14
    assert torch.equal(codec("uniform_grid", feedback=False).decode(grid.encode(x)), q)  # the payload says all
    if clip_range:
        assert grid.decode(grid.encode(torch.tensor([7.0, -7.0]))).tolist() == [0.5, -0.5]


def test_the_server_keeps_exact_weights_and_gradients_are_taken_at_quantized_ones():
    weight, optimizer = start(lr=0.01, weight=UniformGrid(k=2))
    assert weight.unique().numel() <= 9
    x = optimizer.state[weight]["x"]
    assert x.unique().numel() > 1000
    steps(weight, optimizer, 5)
    assert weight.unique().numel() <= 9
    assert optimizer.state[weight]["x"].unique().numel() > 1000


def test_on_a_quadratic_updates_converge_and_coarse_weights_stall():
    target = torch.linspace(-0.4, 0.4, 1920).view(SHAPE)
    distance = {}
    for name, weight_codec in (("none", None), ("fine", UniformGrid(k=6)), ("coarse", UniformGrid(k=2))):
        weight, optimizer = start(lr=0.02, weight=weight_codec)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (t + 1) ** -0.5)
        errors = []
        for _ in range(400):
            weight.grad = weight.detach() - target
            optimizer.step()
            schedule.step()
            errors.append(optimizer.state[weight]["e"].norm().item())
        distance[name] = (weight.detach() - target).norm().item()
        # |u| <= 7.27 lr; the error stays of the size of a step
        assert max(errors) < 10 * 7.27 * 0.02 * 1920**0.5
        assert errors[-1] < errors[20] * 2
    assert distance["none"] < 0.2 * distance["coarse"]
    assert distance["fine"] < 0.3 * distance["coarse"]


def test_a_gradient_that_is_not_finite_changes_nothing():
    for value in (float("nan"), float("inf"), 1e30):
        weight, optimizer = start(lr=0.01)
        steps(weight, optimizer, 2)
        before, at = copy.deepcopy(optimizer.state_dict()["state"]), weight.detach().clone()
        weight.grad = torch.zeros(SHAPE)
        weight.grad[3, 3] = value
        optimizer.step()
        assert optimizer.skipped == 1
        assert torch.equal(weight, at)
        for key, old in before[0].items():
            assert torch.equal(optimizer.state_dict()["state"][0][key], old), key


def test_zero_gradients_and_theta_of_zero():
    weight, optimizer = start(lr=0.01, theta=0.0, weight=None)
    at = weight.detach().clone()
    weight.grad = torch.zeros(SHAPE)
    weight.grad[0, 0] = 3.0
    optimizer.step()
    assert torch.isfinite(weight).all()
    assert (weight != at).sum() == 1
    assert weight[0, 0].item() == pytest.approx(at[0, 0].item() - 0.01 * 0.1, abs=1e-6)  # lr (1 - beta) sign(g)


@pytest.mark.parametrize("kind", [QuantizedAdam, OneBitAdam])
def test_resuming_is_bit_identical_with_plain_tensors(kind):
    def made():
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(SHAPE).to(torch.bfloat16))
        bias = torch.nn.Parameter(torch.zeros(7))
        options = {"freeze_step": 2} if kind is OneBitAdam else {}
        groups = [{"params": [("w", weight)]}, {"params": [("b", bias)], "lr": 0.1}]
        return (weight, bias), kind(groups, lr=0.01, **options)

    def train(parameters, optimizer, count):
        for step in count:
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(p.dtype)
            optimizer.step()

    first, optimizer = made()
    train(first, optimizer, range(4))
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "w": first}, file)
    train(first, optimizer, range(4, 8))
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    second, again = made()
    with torch.no_grad():
        for p, value in zip(second, stored["w"], strict=True):
            p.copy_(value)
    again.load_state_dict(stored["optimizer"])
    assert again.state[second[0]]["m"].dtype == torch.float32  # PyTorch would have cast it
    train(second, again, range(4, 8))
    for p, q in zip(first, second, strict=True):
        assert torch.equal(p, q)
    assert optimizer.comm.step == again.comm.step == 8


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0}, {"beta": 1.0}, {"theta": 1.5}, {"eps": 0.0}, {"weight_decay": -1.0}, {"min_elements": 0},
        {"update": "log_grid"}, {"lr": float("nan")}, {"beta": True},
    ],
)  # fmt: skip
def test_illegal_options(options):
    with pytest.raises(GradbitsError, match=next(iter(options))):
        start(**options)


@pytest.mark.parametrize("options", [{"k": -1}, {"k": 15}, {"k": True}])
def test_illegal_grids(options):
    for kind in (LogGrid, UniformGrid):
        with pytest.raises(GradbitsError, match="k="):
            kind(**options)


def test_states_of_other_shapes_and_late_groups_are_refused():
    _, optimizer = start()
    other = QuantizedAdam([torch.nn.Parameter(torch.zeros(50, 50))])
    with pytest.raises(ArgumentError, match="shape"):
        optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ArgumentError, match="groups"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    state = optimizer.state_dict()
    with pytest.raises(ArgumentError, match="rank 1 of 2"):
        optimizer.load_state_dict({**state, "wire": {**state["wire"], "rank": 1, "world": 2}})


RANKS = """
from gradbits.optim import OneBitAdam, QuantizedAdam


def local_train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, dist.get_rank(), step).backward()
        optimizer.step()


def main(rank, world):
    for kind, options in ((QuantizedAdam, {}), (OneBitAdam, {"freeze_step": 3})):
        model = net(norm=False)
        optimizer = kind(model.named_parameters(), lr=0.01, min_elements=100, **options)
        local_train(model, optimizer, range(8))
        assert equal_everywhere(flat(model)), kind
        assert optimizer.comm.ratio > 1.2, optimizer.comm.ratio
        states = [None] * world
        dist.all_gather_object(states, optimizer.state_dict())
        at = flat(model)
        # a worker whose gradient is not finite: nobody moves
        optimizer.zero_grad()
        loss_of(model, rank, 8).backward()
        if rank == 1:
            model[0].weight.grad[0, 0] = float("nan")
        optimizer.step()
        assert optimizer.skipped == 1, (kind, optimizer.skipped)
        assert torch.equal(flat(model), at), kind
        local_train(model, optimizer, range(8, 12))
        again = net(norm=False)
        second = kind(again.named_parameters(), lr=0.01, min_elements=100, **options)
        torch.nn.utils.vector_to_parameters(at, again.parameters())
        second.load_ranks(states)
        local_train(again, second, range(8, 12))
        assert torch.equal(flat(again), flat(model)), kind

    # x - mean(e) takes exact Adam's steps, and does not change with the number of workers
    model = net(norm=False)
    optimizer = QuantizedAdam(model.named_parameters(), lr=0.01, min_elements=100)
    local_train(model, optimizer, range(3))
    states = [None] * world
    dist.all_gather_object(states, optimizer.state_dict())

    def virtual(states):
        found = []
        for number, p in enumerate(model.parameters()):
            parts = [state["state"][number] for state in states]
            x = torch.cat([part["x"] for part in parts])[: p.numel()]
            found.append(x - torch.stack([part["e"] for part in parts]).mean(0).flatten())
        return torch.cat(found)

    single = dist.new_group([0])
    if rank == 0:
        alone = QuantizedAdam(net(norm=False).named_parameters(), lr=0.01, min_elements=100, process_group=single)
        alone.load_ranks(states)
        assert torch.allclose(virtual(states), virtual([alone.state_dict()]), rtol=1e-5, atol=1e-7)
"""


def test_on_several_ranks(tmp_path):
    run_ranks(tmp_path, RANKS)
