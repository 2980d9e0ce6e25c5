"""NaN and Inf: propagated, refused or skipped as asked, and never kept."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import gradbits as gb
from gradbits.core.errors import NonFiniteError

BAD = pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
KINDS = {
    "linear": (lambda: nn.Linear(6, 4), (5, 6)),
    "conv": (lambda: nn.Conv2d(2, 4, 3, padding=1), (2, 2, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(2, 4, 3), (2, 2, 5)),
}


def layer_of(kind: str, policy: str, recipe: str = "unified_int8") -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    layer = make()
    rules = gb.recipe(recipe)
    if recipe == "unified_int8":
        rules = gb.recipe(recipe, activation_range="ema", keep_float=(), refresh=1)
    gb.quantize_(layer, rules, on_nonfinite=policy)
    x = torch.randn(shape)
    layer(x).square().sum().backward()  # states are settled
    layer.zero_grad()
    return layer, x


def poison(x: torch.Tensor, bad: float) -> torch.Tensor:
    x = x.clone()
    x.view(-1)[3] = bad
    return x


def unchanged(layer: nn.Module, before: dict[str, torch.Tensor], role: str) -> None:
    names = [name for name in before if role in name]
    assert names
    for name in names:
        assert torch.equal(layer.state_dict()[name], before[name]), name


@BAD
@pytest.mark.parametrize("kind", KINDS)
def test_propagate(kind, bad):
    layer, x = layer_of(kind, "propagate")
    before = copy.deepcopy(layer.state_dict())
    y = layer(poison(x, bad))
    assert bool(torch.isnan(y).any())
    unchanged(layer, before, "output_input")
    y = layer(x.requires_grad_())
    y.backward(poison(torch.ones_like(y), bad))
    unchanged(layer, before, "gradient")
    assert bool(torch.isnan(x.grad).any())
    assert bool(torch.isnan(layer.weight.grad).any())
    layer.zero_grad()
    layer(x).square().sum().backward()  # the next step is an ordinary one
    assert all(bool(torch.isfinite(p.grad).all()) for p in layer.parameters())


@BAD
@pytest.mark.parametrize("kind", KINDS)
def test_raise_names_the_layer(kind, bad):
    net = nn.Sequential(nn.Identity(), layer_of(kind, "raise")[0])
    layer, x = net[1], layer_of(kind, "raise")[1]
    gb.quantize_(net, gb.recipe("unified_int8", activation_range="ema", keep_float=(), refresh=1), on_nonfinite="raise")
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(NonFiniteError, match="input of layer '1' holds NaN or Inf"):
        net(poison(x, bad))
    y = net(x)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(NonFiniteError, match="gradient of layer '1' holds NaN or Inf"):
        y.backward(poison(torch.ones_like(y), bad))
    unchanged(layer, before, "_")
    with torch.no_grad():
        layer.weight.view(-1)[0] = bad
    with pytest.raises(NonFiniteError, match="weight of layer '1'"):
        net(x)


@BAD
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", ["unified_int8", "int8_dynamic"])
def test_skip_gives_zero_gradients_with_a_warning(kind, bad, recipe):
    layer, x = layer_of(kind, "skip", recipe)
    before = copy.deepcopy(layer.state_dict())
    for input_bad in (False, True):
        layer.zero_grad()
        given = (poison(x, bad) if input_bad else x).detach().requires_grad_()
        y = layer(given)
        with pytest.warns(RuntimeWarning, match="gradient of layer '' holds NaN or Inf"):
            y.backward(poison(torch.ones_like(y), bad))
        for grad in (given.grad, *(p.grad for p in layer.parameters())):
            assert not grad.any()
    for name, value in before.items():
        assert bool(torch.isfinite(layer.state_dict()[name]).all())
        if "gradient" in name:
            assert torch.equal(layer.state_dict()[name], value)


def test_skip_leaves_finite_gradients_alone():
    layer, x = layer_of("linear", "skip")
    twin, _ = layer_of("linear", "propagate")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for module in (layer, twin):
            torch.manual_seed(1)
            y = module(x)
            y.backward(torch.full_like(y, 3e38))  # its sum overflows, its elements are finite
    assert torch.equal(layer.weight.grad, twin.weight.grad)


def test_a_gradient_scaler_sees_the_overflow():
    layer, x = layer_of("linear", "propagate")
    y = layer(x)
    y.backward(torch.full_like(y, float("inf")))
    assert not bool(torch.isfinite(layer.weight.grad).all())
