"""Deviation-counteractive learning rates: each layer's rate is scaled, not its gradient, and nobody else notices."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gradbits as gb
from gradbits.core.errors import ArgumentError
from gradbits.optim.companion import learning_rate_factor


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    gb.quantize_(net, {"4": None, "*": gb.recipe("unified_int8", keep_float=())})
    return net


def backward(net: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    net.zero_grad()
    net(torch.randn(16, 6)).square().sum().backward()


def set_deviation(net: nn.Sequential, index: str, value: float) -> None:
    net[int(index)].quantizers.grad_input_gradient_deviation.fill_(value)


def test_factor() -> None:
    """phi(d) = max(exp(-20 d), 0.1): 1 at 0, never rising, at its floor from ln(10)/20 on."""
    assert learning_rate_factor(0.0) == 1.0
    assert learning_rate_factor(0.05) == pytest.approx(0.36787944)
    assert learning_rate_factor(0.1) == pytest.approx(0.13533528)
    values = [learning_rate_factor(i / 500) for i in range(100)]
    assert values == sorted(values, reverse=True)
    assert all(v == 0.1 for v in values if values.index(v) > 58)


def test_the_learning_rate_is_scaled_not_the_gradient() -> None:
    """SGD with momentum by hand: the momentum gathers whole gradients, the step takes the layer's own rate."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    companion = gb.optim.attach_companion_(optimizer, net)
    assert companion is not None
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    momentum = {name: torch.zeros_like(p) for name, p in weights.items()}
    for step, deviation in enumerate((0.0, 0.03, 0.2)):
        backward(net, step)
        set_deviation(net, "0", deviation)
        set_deviation(net, "2", deviation / 2)
        optimizer.step()
        for name, p in net.named_parameters():
            assert p.grad is not None
            factor = {"0": learning_rate_factor(deviation), "2": learning_rate_factor(deviation / 2)}.get(name[0], 1.0)
            momentum[name] = 0.9 * momentum[name] + p.grad
            weights[name] = weights[name] - 0.1 * factor * momentum[name]
            torch.testing.assert_close(p.detach(), weights[name])
        assert companion.factors()["0"] == pytest.approx(learning_rate_factor(deviation))


def test_state_dict_and_schedulers_see_their_own_groups() -> None:
    net, plain = network(), network()
    groups = [{"params": net[0].parameters()}, {"params": [*net[2].parameters(), *net[4].parameters()], "lr": 0.01}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    gb.optim.attach_companion_(optimizer, net)
    for step in range(2):
        backward(net, step)
        set_deviation(net, "0", 0.05)
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.0025]
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 4]
    fresh = torch.optim.AdamW(
        [{"params": plain[0].parameters()}, {"params": [*plain[2].parameters(), *plain[4].parameters()]}]
    )
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert fresh.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_a_step_that_raises_leaves_the_groups_to_be_restored() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    gb.optim.attach_companion_(optimizer, net)
    backward(net, 0)
    set_deviation(net, "0", 0.05)
    groups = optimizer.param_groups

    def broken() -> float:
        raise RuntimeError("closure")

    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step(broken)
    optimizer.step()
    assert optimizer.param_groups is groups
    assert groups[0]["lr"] == 0.1


def test_detach_leaves_the_optimizer_as_it_was() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    companion = gb.optim.attach_companion_(optimizer, net)
    assert companion is not None
    companion.detach()
    backward(net, 0)
    set_deviation(net, "0", 1.0)
    before = net[0].weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(net[0].weight.detach(), before - net[0].weight.grad)


def test_nothing_to_attach() -> None:
    net = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    assert gb.optim.attach_companion_(optimizer, net) is None
    gb.quantize_(net, "int8_dynamic")
    assert gb.optim.attach_companion_(optimizer, net) is None
    with pytest.raises(ArgumentError, match="no layer follows"):
        gb.optim.DeviationCounteractiveLR(optimizer, net)
