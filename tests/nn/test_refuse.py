"""Transforms and tracers that a quantized layer cannot take part in are refused by name, the rest goes on working."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap

import gradbits as gb
from gradbits.core.errors import DtypeError, GradbitsError, UnsupportedError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 3))


def quantized() -> tuple[nn.Sequential, torch.Tensor]:
    net = network()
    gb.quantize_(net, "int8_dynamic")
    return net, torch.randn(4, 2, 4, 4)


def loss(net: nn.Module, parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return functional_call(net, parameters, (x,)).square().sum()


def dual(net: nn.Module, x: torch.Tensor) -> None:
    with forward_ad.dual_level():
        net(forward_ad.make_dual(x, torch.ones_like(x)))


CALLS = {
    "torch.func grad": lambda net, x: grad(lambda p: loss(net, p, x))(dict(net.named_parameters())),
    "torch.func vmap": lambda net, x: vmap(lambda y: net(y.unsqueeze(0)), randomness="different")(x),
    "torch.func jvp": lambda net, x: jvp(net, (x,), (x,)),
    "torch.func jacrev": lambda net, x: jacrev(net)(x),
    "forward-mode": dual,
    "torch.export": lambda net, x: torch.export.export(net, (x,)),
    "traced by torch.jit": lambda net, x: torch.jit.trace(net, (x,)),
    "scripted by torch.jit": lambda net, x: torch.jit.script(net),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("call", CALLS)
def test_it_is_refused_and_the_model_goes_on(call):
    net, x = quantized()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(UnsupportedError, match=rf"layer '0' is quantized.*{call.split()[0]}"):
        CALLS[call](net, x)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    net(x).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_the_meta_device_is_refused():
    net, x = quantized()
    with pytest.raises(UnsupportedError, match=r"meta.*call quantize_ afterwards"):
        net.to("meta")(x.to("meta"))


def test_what_is_no_tensor_is_refused():
    net, _ = quantized()
    for wrong in ([1.0, 2.0], None):
        with pytest.raises(DtypeError, match="input: of layer '0' must be a tensor"):
            net(wrong)
    with pytest.raises(DtypeError, match="not Proxy"):
        torch.fx.symbolic_trace(net)
    product = gb.nn.Matmul()
    gb.quantize_(product, "int8_dynamic")
    with pytest.raises(DtypeError, match="must be a tensor"):
        product(torch.ones(2, 2), [1.0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_the_message_says_works():
    net, x = quantized()
    assert torch.equal(functional_call(net, dict(net.named_parameters()), (x,)), net(x))
    twin = copy.deepcopy(net)
    gb.dequantize_(twin)
    want = twin(x)
    assert torch.allclose(torch.jit.trace(twin, (x,))(x), want)
    assert torch.allclose(torch.jit.script(twin)(x), want)
    assert torch.allclose(torch.export.export(twin, (x,)).module()(x), want)
    assert set(grad(lambda p: loss(twin, p, x))(dict(twin.named_parameters()))) == set(dict(net.named_parameters()))
    gb.quantize_(twin, "int8_dynamic")
    assert torch.equal(twin(x), net(x))


def test_it_is_an_error_of_ours():
    assert issubclass(UnsupportedError, (GradbitsError, NotImplementedError))
