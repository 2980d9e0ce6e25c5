"""``report(model, inputs)``: what computes each product, and whether quantizing a layer pays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gradbits as gb
from gradbits.core.errors import ArgumentError
from gradbits.kernels import dispatch
from gradbits.nn.report import Report, Row

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(**options) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10), nn.Linear(10, 2)]
    net = nn.Sequential(*layers)
    recipe = gb.recipe("unified_int8", activation_range="ema").with_overrides({"keep_float": ()})
    gb.quantize_(net, {"5": None, "*": recipe}, **options)
    return net


def test_quantized_layers_are_timed_and_nothing_else_happens() -> None:
    net = network()
    net(X).sum().backward()
    state, grads = copy.deepcopy(net.state_dict()), [p.grad.clone() for p in net.parameters()]
    fired = []
    net[4].register_forward_hook(lambda *_: fired.append(1))
    rng = torch.get_rng_state()
    report = gb.report(net, (X,))
    assert [r.speed is not None and r.speed > 0 for r in report.rows] == [True, True, False]
    assert "float / this" in str(report)
    assert "float / this" not in str(gb.report(net))
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), grads, strict=True))
    assert len(fired) == 1  # the forward pass that shows what each layer gets
    assert net.training
    assert not net[4]._forward_pre_hooks


def test_layers_that_do_not_pay_are_named() -> None:
    row = Row("a", "Linear", "int8_dynamic", "8×8", "8×8", "8×8", "torch", "", 0.5)
    assert Report((row,)).slower == (row,)
    assert "slower than in float on this machine, so better left out by a rule: a" in str(Report((row,)))
    fast = Report((Row("b", "Linear", "int8_dynamic", "8×8", "8×8", "8×8", "torch", "", 0.97),))
    assert not fast.slower
    assert "slower" not in str(fast)


def test_backends_are_those_of_the_last_call(monkeypatch) -> None:
    net = network()
    net(X).sum().backward()
    used = {}
    for name in ("0", "4"):
        layer = dict(net.named_modules())[name]
        asked = []
        real = dispatch.choose

        def choose(op, request, compute="auto", real=real, asked=asked):
            kernel = real(op, request, compute)
            asked.append(kernel.backend)
            return kernel

        monkeypatch.setattr("gradbits.nn.bilinear.choose", choose)
        x = torch.randn(layer.assignment.shapes[0]["input"]).requires_grad_()
        layer(x).sum().backward()
        monkeypatch.setattr("gradbits.nn.bilinear.choose", real)
        used[name] = asked
    for row in gb.report(net).quantized:
        names = row.backend.split(", ")
        if len(names) == 1:
            names = [f"{product} {row.backend}" for product in ("output", "grad_input", "grad_weight")]
        assert sorted(name.split()[-1] for name in names) == sorted(used[row.name])


def test_simulated_layers_say_so_before_and_after_a_call() -> None:
    net = network(compute="simulate")
    assert {r.backend for r in gb.report(net).quantized} == {"simulate"}
    net(X)
    assert {r.backend for r in gb.report(net).quantized} == {"simulate"}


def test_inputs_must_be_a_tuple() -> None:
    with pytest.raises(ArgumentError, match="inputs: must be a tuple"):
        gb.report(network(), X)
