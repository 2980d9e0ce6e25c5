"""``quantize_(model, recipe, pack_activations=bits)``: the context without writing it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import gradbits as gb
from gradbits.core.errors import ArgumentError
from gradbits.observe import saved_bytes

X = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.LayerNorm(64))


def gradients(net: nn.Module, bits: int | None = None) -> list[torch.Tensor]:
    net.zero_grad()
    torch.manual_seed(1)
    if bits is None:
        y = net(X)
    else:
        with gb.pack_activations(bits=bits):
            y = net(X)
    y.square().sum().backward()
    return [p.grad.clone() for p in net.parameters()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_it_is_the_context_around_every_forward_pass() -> None:
    plain, packed = network(), network()
    gb.quantize_(plain, "int8_dynamic")
    report = gb.quantize_(packed, "int8_dynamic", pack_activations=4)
    assert report.pack_activations == 4
    assert "in 4 bits" in str(report)
    assert equal(gradients(packed), gradients(plain, bits=4))
    assert not equal(gradients(packed), gradients(plain))
    assert report.to_dict()["pack_activations"] == 4


def test_asking_again_changes_it_and_dequantize_ends_it() -> None:
    net = network()
    gb.quantize_(net, "int8_dynamic", pack_activations=4)
    gb.quantize_(net, "int8_dynamic", pack_activations=2)
    assert gb.report(net).pack_activations == 2
    assert len(net._forward_hooks) == len(net._forward_pre_hooks) == 1
    gb.quantize_(net, "int8_dynamic")
    assert gb.report(net).pack_activations is None
    gb.quantize_(net, "int8_dynamic", pack_activations=8)
    gb.dequantize_(net)
    assert not net._forward_hooks
    assert not net._forward_pre_hooks
    assert not net._forward_hooks_always_called


def test_copies_and_saved_models_pack_too() -> None:
    net = network()
    gb.quantize_(net, "int8_dynamic", pack_activations=4)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert equal(gradients(twin), gradients(net))


def test_a_forward_pass_that_fails_stops_packing() -> None:
    net = network()
    gb.quantize_(net, "int8_dynamic", pack_activations=2)
    with pytest.raises(ArgumentError, match="does not fit layer"):
        net(torch.randn(3, 5))
    layer = nn.Linear(64, 64)
    assert saved_bytes(layer, lambda: layer(X)) == X.nbytes
    x = X.clone().requires_grad_()
    y = (x * 1.0).square()
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], 2 * X)


def test_illegal_bits_change_nothing() -> None:
    net = network()
    with pytest.raises(ArgumentError, match="pack_activations=9"):
        gb.quantize_(net, "int8_dynamic", pack_activations=9)
    assert type(net[0]) is nn.Linear
