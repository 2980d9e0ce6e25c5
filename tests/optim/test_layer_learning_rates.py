"""Layer learning rates with every kind of optimizer, scheduler and failure; ``test_companion`` has the rule itself."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

import gradbits as gb
from gradbits.core.errors import GradbitsError
from gradbits.optim.companion import learning_rate_factor


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    gb.quantize_(net, {"0": gb.recipe("unified_int8", keep_float=()), "2": gb.recipe("unified_int8", alpha=5.0)})
    return net


def set_deviations(net: nn.Module, first: float, second: float) -> None:
    for layer, value in ((net[0], first), (net[2], second)):
        layer.state_of("grad_input", "gradient")["deviation"].fill_(value)


def set_gradients(net: nn.Module, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=rng)


def test_the_factor():
    values = [learning_rate_factor(d) for d in (0.0, 0.05, 0.1, 0.1151, 0.1152, 0.5, 2.0)]
    assert values == pytest.approx([1.0, 0.36788, 0.13534, 0.10006, 0.1, 0.1, 0.1], abs=1e-5)
    assert values == sorted(values, reverse=True)
    assert learning_rate_factor(0.3, alpha=0.0) == 1.0
    assert learning_rate_factor(1.0, alpha=2.0, beta=0.0) == pytest.approx(math.exp(-2))


def test_sgd_with_momentum_by_hand():
    net = network()
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    gb.optim.attach_companion_(opt, net)
    weights = [p.detach().double().clone() for p in net.parameters()]
    momentum = [torch.zeros_like(w) for w in weights]
    for step, (first, second) in enumerate([(0.0, 0.02), (0.05, 0.3), (0.2, 0.0)]):
        set_deviations(net, first, second)
        set_gradients(net, step)
        factors = [max(math.exp(-20 * first), 0.1)] * 2 + [max(math.exp(-5 * second), 0.1)] * 2 + [1.0] * 2
        for i, p in enumerate(net.parameters()):
            momentum[i] = 0.9 * momentum[i] + p.grad.double()  # the buffer holds unscaled gradients
            weights[i] -= 0.1 * factors[i] * momentum[i]
        opt.step()
        for p, w in zip(net.parameters(), weights, strict=True):
            assert torch.allclose(p.detach().double(), w, rtol=1e-5, atol=1e-6)


def test_scaling_the_gradient_would_be_something_else():
    """What the test above distinguishes: with momentum the two rules part at the second step."""
    results = []
    for scale_gradient in (False, True):
        net = network()
        opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        if not scale_gradient:
            gb.optim.attach_companion_(opt, net)
        for step, deviation in enumerate((0.0, 0.1)):
            set_deviations(net, deviation, 0.0)
            set_gradients(net, step)
            if scale_gradient:
                for p in net[0].parameters():
                    p.grad *= learning_rate_factor(deviation)
            opt.step()
        results.append(net[0].weight.detach().clone())
    assert not torch.allclose(*results, atol=1e-3)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_deviation_means_no_difference(name):
    results = []
    for attach in (False, True):
        net = network()
        opt = OPTIMIZERS[name](net.parameters())
        if attach:
            gb.optim.attach_companion_(opt, net)
        for step in range(3):
            set_deviations(net, 0.0, 0.0)
            set_gradients(net, step)
            opt.step()
        results.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_dict_and_groups_stay_what_they_were(name):
    net = network()
    opt = OPTIMIZERS[name]([{"params": net[0].parameters(), "lr": 0.5}, {"params": list(net[2:].parameters())}])
    groups = opt.param_groups
    before = [(id(g), g["lr"], [id(p) for p in g["params"]]) for g in groups]
    gb.optim.attach_companion_(opt, net)
    set_deviations(net, 0.07, 0.3)
    set_gradients(net, 0)
    opt.step()
    assert opt.param_groups is groups
    assert [(id(g), g["lr"], [id(p) for p in g["params"]]) for g in opt.param_groups] == before
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert [len(g["params"]) for g in loaded["param_groups"]] == [2, 4]
    twin = copy.deepcopy(net)
    fresh = OPTIMIZERS[name]([{"params": twin[0].parameters(), "lr": 0.5}, {"params": list(twin[2:].parameters())}])
    gb.optim.attach_companion_(fresh, twin)
    fresh.load_state_dict(loaded)
    for module, optimizer in ((net, opt), (twin, fresh)):
        set_gradients(module, 1)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("before", [True, False])
def test_schedulers_drive_the_base_rate(before):
    net = network()
    opt = torch.optim.SGD(net.parameters(), lr=1.0)
    if before:
        gb.optim.attach_companion_(opt, net)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    if not before:
        gb.optim.attach_companion_(opt, net)
    set_deviations(net, 0.05, 0.0)
    for step in range(3):
        set_gradients(net, step)
        old, grad = net[0].weight.detach().clone(), net[0].weight.grad.clone()
        opt.step()
        assert torch.allclose(net[0].weight, old - 0.5**step * math.exp(-1.0) * grad, atol=1e-6)
        scheduler.step()
        assert opt.param_groups[0]["lr"] == 0.5 ** (step + 1)
        assert scheduler.get_last_lr() == [0.5 ** (step + 1)]


class Failing(torch.optim.SGD):
    """Fails inside of its own step."""

    fail = True

    @torch.no_grad()
    def step(self, closure=None):
        if self.fail:
            raise RuntimeError("inside")
        return super().step(closure)


def test_a_step_that_raises_leaves_the_groups_restored():
    net = network()
    opt = Failing(net.parameters(), lr=0.1)
    gb.optim.attach_companion_(opt, net)
    groups = opt.param_groups
    set_deviations(net, 0.1, 0.1)
    set_gradients(net, 0)
    with pytest.raises(RuntimeError, match="inside"):
        opt.step()
    assert opt.param_groups is groups
    assert len(opt.state_dict()["param_groups"]) == 1
    opt.fail = False
    opt.step()
    assert opt.param_groups is groups


def test_a_closure_that_raises_leaves_the_groups_restored():
    net = network()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    gb.optim.attach_companion_(opt, net)
    groups = opt.param_groups

    def closure():
        raise RuntimeError("in the closure")

    with pytest.raises(RuntimeError, match="in the closure"):
        opt.step(closure)
    assert opt.param_groups is groups


def test_a_closure_sees_the_base_rate_in_its_result():
    net = network()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    gb.optim.attach_companion_(opt, net)
    x = torch.randn(8, 6)

    def closure():
        opt.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        return loss

    assert float(opt.step(closure).detach()) > 0
    assert opt.param_groups[0]["lr"] == 0.1


def test_two_models_one_optimizer_each_and_shared_parameters():
    net = network()
    net[2].bias = nn.Parameter(net[2].bias.detach())
    spare = nn.Parameter(torch.ones(3))
    opt = torch.optim.SGD([*net.parameters(), spare], lr=0.1)
    gb.optim.attach_companion_(opt, net)
    set_deviations(net, 2.0, 0.0)
    set_gradients(net, 0)
    spare.grad = torch.ones(3)
    opt.step()
    assert torch.allclose(spare.detach(), torch.full((3,), 0.9))


def test_detach_and_factors():
    net = network()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    companion = gb.optim.attach_companion_(opt, net)
    set_deviations(net, 0.05, 0.0)
    assert companion.factors() == pytest.approx({"0": math.exp(-1.0), "2": 1.0})
    companion.detach()
    set_gradients(net, 0)
    old = net[0].weight.detach().clone()
    opt.step()
    assert torch.allclose(net[0].weight, old - 0.1 * net[0].weight.grad)


@pytest.mark.parametrize(("alpha", "beta"), [(-1.0, 0.1), (20.0, 1.5), (20.0, -0.1), (float("nan"), 0.1), ("x", 0.1)])
def test_illegal_constants(alpha, beta):
    net = nn.Linear(3, 3)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)

    def attach() -> None:
        gb.quantize_(net, gb.recipe("unified_int8", keep_float=(), alpha=alpha, beta=beta))
        gb.optim.attach_companion_(opt, net)

    with pytest.raises(GradbitsError, match=r"alpha|beta"):
        attach()
