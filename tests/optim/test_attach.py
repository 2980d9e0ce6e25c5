"""What ``attach_companion_`` refuses: an optimizer that would silently not train what the recipe needs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradbits as gb
from gradbits.core.errors import ArgumentError, DtypeError


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))


def test_learned_steps_must_be_in_the_optimizer() -> None:
    net = network()
    early = torch.optim.SGD(net.parameters(), lr=0.1)
    gb.quantize_(net, "int4_transformer")
    with pytest.raises(ArgumentError, match="build the optimizer after quantize_"):
        gb.optim.attach_companion_(early, net)
    assert gb.optim.attach_companion_(torch.optim.SGD(net.parameters(), lr=0.1), net) is None


def test_frozen_steps_may_be_left_out() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    gb.quantize_(net, "int4_transformer")
    for name, p in net.named_parameters():
        if "quantizers" in name:
            p.requires_grad_(False)
    assert gb.optim.attach_companion_(optimizer, net) is None


def test_another_models_optimizer_is_refused() -> None:
    net = network()
    gb.quantize_(net, gb.recipe("unified_int8", keep_float=()))
    with pytest.raises(ArgumentError, match="none of the model's parameters"):
        gb.optim.attach_companion_(torch.optim.SGD(network().parameters(), lr=0.1), net)


def test_twice_is_refused_until_detached() -> None:
    net = network()
    gb.quantize_(net, gb.recipe("unified_int8", keep_float=()))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    first = gb.optim.attach_companion_(optimizer, net)
    assert first is not None
    with pytest.raises(ArgumentError, match="already"):
        gb.optim.attach_companion_(optimizer, net)
    first.detach()
    assert gb.optim.attach_companion_(optimizer, net) is not None


def test_wrong_types_are_refused() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(DtypeError, match="optimizer: must be"):
        gb.optim.attach_companion_(scheduler, net)  # type: ignore[arg-type]
    with pytest.raises(DtypeError, match="model: must be"):
        gb.optim.attach_companion_(optimizer, None)  # type: ignore[arg-type]
    with pytest.raises(DtypeError, match="average="):
        gb.optim.attach_companion_(optimizer, net, average="no")  # type: ignore[arg-type]
