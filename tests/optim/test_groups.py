"""What quantizers learn gets its own learning rate and no weight decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradbits as gb
from gradbits.core.errors import ArgumentError


def network(recipe: str = "ewgs", **options) -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    gb.quantize_(net, gb.recipe(recipe, **{"keep_float": (), **options}))
    net(torch.randn(16, 4))
    return net


def learned(net: nn.Module) -> set[torch.Tensor]:
    return {p for name, p in net.named_parameters() if "quantizers" in name}


@pytest.mark.parametrize("recipe", ["ewgs", "lsq"])
def test_groups(recipe):
    net = network(recipe, quantizer_rate=0.25)
    opt = torch.optim.SGD(net.parameters(), lr=0.4, weight_decay=0.01, momentum=0.9)
    assert gb.optim.attach_companion_(opt, net) is None
    weights, own = opt.param_groups
    assert set(own["params"]) == learned(net)
    assert not set(weights["params"]) & learned(net)
    assert (own["lr"], own["weight_decay"], own["momentum"]) == (0.1, 0.0, 0.9)
    assert (weights["lr"], weights["weight_decay"]) == (0.4, 0.01)
    gb.optim.attach_companion_(opt, net)  # nothing more to do
    assert len(opt.param_groups) == 2
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5)
    assert [group["lr"] for group in opt.param_groups] == [0.2, 0.05]
    assert scheduler.get_last_lr() == [0.2, 0.05]


def test_what_the_optimizer_does_not_touch_stays_without_weight_decay():
    net = network(delta=0.0)
    opt = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
    gb.optim.attach_companion_(opt, net)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name]) is ("quantizers" in name or not bool(before[name].any())), name


def test_groups_that_the_user_made_stay():
    net = network()
    own = learned(net)
    rest = [p for p in net.parameters() if p not in own]
    opt = torch.optim.SGD([{"params": rest}, {"params": list(own), "lr": 1e-5}], lr=0.1, weight_decay=0.01)
    gb.optim.attach_companion_(opt, net)
    assert len(opt.param_groups) == 2
    assert opt.param_groups[1]["lr"] == 1e-5


def test_after_a_scheduler_it_is_too_late():
    net = network()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.optim.lr_scheduler.StepLR(opt, 3)
    with pytest.raises(ArgumentError, match="before making one"):
        gb.optim.attach_companion_(opt, net)
    assert len(opt.param_groups) == 1
