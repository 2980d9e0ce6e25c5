"""What has no integer form is refused with the reason, and the model stays as it was."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

import gradbits as gb
from gradbits.core.errors import ArgumentError, GraphError
from gradbits.nn.qat import graph_forward

integers: Any = import_module("tests.nn.integers")
batch, trained = integers.batch, integers.trained


class Softmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).softmax(-1))


def test_what_cannot_be_converted_says_why_and_stays():
    net, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    with pytest.raises(GraphError, match="quantize_"):
        gb.convert_(net)
    gb.quantize_(net, "qat_int8")
    with pytest.raises(GraphError, match="ranges of input_1 are not known"):
        gb.convert_(net)
    net(x)
    assert gb.convert_(net)(x).shape == (3, 4)

    net = Softmax()
    gb.quantize_(net, "qat_int8")
    net(x)
    want = net.eval()(x).detach()
    with pytest.raises(GraphError, match="softmax has no integer form"):
        gb.convert_(net)
    assert torch.equal(net(x), want)
    with pytest.raises(TypeError, match="model"):
        gb.convert_("net")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.ConvTranspose2d(2, 3, 2), "transposed"),
        (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
    ],
)
def test_layers_without_an_integer_form(layer, why):
    net = nn.Sequential(layer)
    gb.quantize_(net, "qat_int8")
    x = torch.randn(2, 2, 5, 5)
    net(x).sum().backward()
    assert bool(torch.isfinite(net.eval()(x)).all())
    with pytest.raises(GraphError, match=why):
        gb.convert_(net)


def test_sums_that_could_overflow_are_refused():
    net = nn.Sequential(nn.Linear(70_000, 1))
    gb.quantize_(net, "qat_int8")
    net(torch.randn(2, 70_000))
    with pytest.raises(GraphError, match="70000 products in a sum could overflow int32"):
        gb.convert_(net)


def test_what_a_converted_model_does_not_take():
    model = gb.convert_(trained("small_cnn"))
    with pytest.raises(ArgumentError, match="got 0; the model takes input"):
        model()
    with pytest.raises(ArgumentError, match="must have 4 axes and 2 channels"):
        model(torch.randn(2, 3, 9, 9))
    with pytest.raises(ArgumentError, match="must have 4 axes and 2 channels"):
        model(torch.randn(2, 9, 9))
    linear = gb.convert_(trained("mlp"))
    with pytest.raises(ArgumentError, match="must have 162 features"):
        linear(torch.randn(2, 2, 3))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m[3].weight.data.view(-1)[:1].fill_(float("nan")), "layer '3': weight is not finite"),
        (lambda m: m[3].bias.data.fill_(float("inf")), "layer '3': bias is not finite"),
        (lambda m: m[1].running_var.fill_(float("nan")), "layer '0': running_var of its batch norm '1' is not finite"),
        (lambda m: m[1].running_var.fill_(-1.0), "layer '0': its weight with the running statistics .* folded"),
        (lambda m: m[3].bias.data.fill_(1e30), "layer '3': its scale over that of its result"),
    ],
)
def test_a_network_that_has_diverged_is_evaluated_in_floats(change, named):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(100, 3)
    )
    gb.quantize_(model, "qat_int8")
    x = batch()[0]
    model(x)
    change(model)
    with torch.no_grad():
        y = model.eval()(x)
    forward = graph_forward(model)
    assert forward is not None
    with torch.no_grad():
        floats = forward._follow({str(next(iter(forward.plan.steps)).target): x})
    assert torch.equal(torch.nan_to_num(y), torch.nan_to_num(floats))
    assert bool(torch.isfinite(y).all()) == ("scale" in named)
    with pytest.raises(GraphError, match=named):
        gb.convert_(model)
    assert graph_forward(model) is forward
