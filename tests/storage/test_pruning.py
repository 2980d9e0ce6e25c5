"""Pruning masks: exact counts, and zeros that stay zero whatever the optimizer does."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import nn

from gradbits.core.errors import ArgumentError, NothingToQuantizeError
from gradbits.storage import PruneSchedule, magnitude_mask, prune_, share_

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "momentum": lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda net: torch.optim.Adam(net.parameters(), lr=0.01, weight_decay=0.1),
    "adamw": lambda net: torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1),
}


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 20), nn.ReLU(), nn.Linear(20, 4)
    )


def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    loss = net(torch.randn(16, 2, 8, 8, generator=generator)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_exactly_so_many_are_pruned(sparsity: float, dtype: torch.dtype) -> None:
    for weight in (
        torch.randn(37, 11).to(dtype),
        torch.zeros(20, 5, dtype=dtype),
        torch.full((7, 7), 2.0, dtype=dtype),
    ):
        mask = magnitude_mask(weight, sparsity=sparsity)
        assert int((~mask).sum()) == round(sparsity * weight.numel())
        if mask.any() and not mask.all():
            assert weight[mask].abs().min() >= weight[~mask].abs().max()


def test_thresholds() -> None:
    weight = torch.tensor([-3.0, 0.5, 1.0, 0.0])
    assert magnitude_mask(weight, threshold=1.0).tolist() == [True, False, True, False]
    spread = float(weight.std(correction=0))
    assert magnitude_mask(weight, std_factor=0.5).tolist() == (weight.abs() >= 0.5 * spread).tolist()
    assert magnitude_mask(torch.zeros(0, 3), sparsity=0.5).shape == (0, 3)


def test_prune_sets_zeros_in_place_and_leaves_biases() -> None:
    net = build()
    bias = net[0].bias.clone()
    masks = prune_(net, sparsity=0.75, exclude=["5.*"])
    assert set(masks) == {"0.weight", "3.weight"}
    for name, mask in masks.items():
        weight = net.get_parameter(name)
        assert ((weight != 0) == mask).all()
        assert int((weight == 0).sum()) == round(0.75 * weight.numel())
    assert torch.equal(net[0].bias, bias)
    assert (net[5].weight != 0).all()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_masks_survive_the_optimizer(optimizer: str) -> None:
    net = build()
    schedule = PruneSchedule(net, target=0.8, begin=2, end=10, every=3, overrides=[("5.weight", 0.5), ("0.*", None)])
    chosen = OPTIMIZERS[optimizer](net)
    before: dict[str, torch.Tensor] = {}
    sparsity = []
    for number in range(16):
        step(net, chosen, number)
        schedule.after_step(number)
        for name, mask in schedule.masks.items():
            assert (net.get_parameter(name)[~mask] == 0).all()
            if name in before:
                assert not (mask & ~before[name]).any()  # what is pruned stays pruned
            before[name] = mask.clone()
        sparsity.append(float((net[3].weight == 0).float().mean()))
    assert sparsity == sorted(sparsity)
    assert sparsity[1] == 0
    assert schedule.sparsity() == pytest.approx({"3.weight": 0.8, "5.weight": 0.5}, abs=1e-3)
    assert (net[0].weight != 0).all()
    kept = net[3].weight[schedule.masks["3.weight"]].clone()
    step(net, chosen, 99)
    schedule.after_step(99)
    assert (net[3].weight[schedule.masks["3.weight"]] != kept).any()  # what is kept goes on learning


def test_gradients_of_pruned_weights_are_zero_until_the_hooks_go() -> None:
    net = build()
    schedule = PruneSchedule(net, target=0.5, begin=0, end=0)
    schedule.after_step(0)
    net(torch.randn(4, 2, 8, 8)).sum().backward()
    mask = schedule.masks["3.weight"]
    assert (net[3].weight.grad[~mask] == 0).all()
    assert (net[3].weight.grad[mask] != 0).any()
    schedule.remove()
    net.zero_grad()
    net(torch.randn(4, 2, 8, 8)).sum().backward()
    assert (net[3].weight.grad[~mask] != 0).any()


def test_the_cubic_schedule() -> None:
    schedule = PruneSchedule(nn.Linear(4, 4), target=0.8, begin=10, end=20, initial=0.2)
    assert [schedule.sparsity_at(at, 0.8) for at in (0, 9)] == [0.0, 0.0]
    assert schedule.sparsity_at(10, 0.8) == pytest.approx(0.2)
    assert schedule.sparsity_at(15, 0.8) == pytest.approx(0.8 - 0.6 / 8)
    assert [schedule.sparsity_at(at, 0.8) for at in (20, 99)] == [0.8, 0.8]


def test_a_schedule_that_is_asked_late_still_reaches_its_target() -> None:
    net = nn.Linear(10, 10)
    PruneSchedule(net, target=0.9, begin=0, end=10, every=7).after_step(50)
    assert int((net.weight == 0).sum()) == 90


@pytest.mark.parametrize("at", [1, 5, 9])
def test_a_resumed_run_is_bit_identical(at: int) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer, PruneSchedule]:
        net = build()
        return net, OPTIMIZERS["momentum"](net), PruneSchedule(net, target=0.9, begin=0, end=8, every=2)

    net, optimizer, schedule = start()
    for number in range(12):
        step(net, optimizer, number)
        schedule.after_step(number)
        if number == at:
            file = io.BytesIO()
            parts = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "prune": schedule.state_dict()}
            torch.save(parts, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, optimizer, schedule = start()
    again.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["prune"])
    for number in range(at + 1, 12):
        step(again, optimizer, number)
        schedule.after_step(number)
    assert all(torch.equal(one, other) for one, other in zip(net.parameters(), again.parameters(), strict=True))


def test_nan_weights_do_not_decide_what_is_pruned() -> None:
    net = nn.Linear(10, 10)
    schedule = PruneSchedule(net, target=0.5, begin=0, end=4, every=1)
    schedule.after_step(0)
    good = net.weight.detach().clone()
    with torch.no_grad():
        net.weight[0, 0] = float("nan")
    schedule.after_step(4)
    assert schedule.masks["weight"].all()
    with torch.no_grad():
        net.weight.copy_(good)
    schedule.after_step(5)
    assert int((net.weight == 0).sum()) == 50


def test_sharing_after_pruning_keeps_the_zeros() -> None:
    net = build()
    schedule = PruneSchedule(net, target=0.8, begin=0, end=0)
    schedule.after_step(0)
    zeros = net[3].weight == 0
    share_(net)
    optimizer = OPTIMIZERS["adamw"](net)
    for number in range(3):
        step(net, optimizer, number)
        schedule.after_step(number)
    assert (net[3].weight[zeros] == 0).all()
    assert net[3].weight.unique().numel() <= 33


def test_what_is_illegal_is_named() -> None:
    net = build()
    with pytest.raises(ArgumentError, match="2 rules given"):
        prune_(net, sparsity=0.5, threshold=0.1)
    with pytest.raises(ArgumentError, match=r"sparsity=1\.5"):
        prune_(net, sparsity=1.5)
    with pytest.raises(ArgumentError, match="NaN"):
        magnitude_mask(torch.tensor([float("nan")]), sparsity=0.5)
    with pytest.raises(NothingToQuantizeError):
        prune_(nn.BatchNorm2d(3), sparsity=0.5)
    with pytest.raises(ArgumentError, match="end=3"):
        PruneSchedule(net, target=0.5, begin=5, end=3)
    schedule = PruneSchedule(net, target=0.5, begin=0, end=3)
    with pytest.raises(ArgumentError, match="masks must be there"):
        schedule.load_state_dict({"masks": {}, "done": 1})
    wrong = schedule.state_dict()
    wrong["masks"]["3.weight"] = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(ArgumentError, match="mask of"):
        schedule.load_state_dict(wrong)
