"""Codes of an input that several layers take: made once, and never those of other values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradbits as gb
from gradbits.nn import call


@pytest.fixture
def quantized(monkeypatch):
    """Return the shapes of the inputs that are quantized from here on."""
    seen, original = [], call.Shared.of

    def of(value, q, tokens):
        found = original(value, q, tokens)
        seen.append(found is None or found.codes is None)
        return found

    monkeypatch.setattr(call.Shared, "of", staticmethod(of))
    return seen


def _layers(count: int) -> nn.ModuleList:
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(16, 8) for _ in range(count))
    gb.quantize_(layers, gb.recipe("int8_dynamic").with_overrides({"keep_float": ()}))
    return layers


@pytest.mark.parametrize("shape", [(6, 16), (2, 3, 16)])
def test_layers_of_one_input_quantize_it_once(quantized, shape):
    """Query, key and value."""
    layers = _layers(3)
    x = torch.randn(shape, requires_grad=True) * 2.0
    for layer in layers:
        layer(x)
    assert quantized == [True, False, False]


@pytest.mark.parametrize("shape", [(6, 16), (2, 3, 16)])
@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("change", [lambda x: x.data.mul_(3.0), lambda x: x.detach().numpy().fill(0.5)])
def test_an_input_that_was_changed_uncounted_is_quantized_anew(shape, wanted, change):
    """A buffer that a data loader fills again by NumPy, with or without a gradient of its own."""
    (layer,) = _layers(1)
    x = torch.randn(shape, requires_grad=wanted)
    layer(x)
    change(x)
    assert torch.equal(layer(x), layer(x.detach().clone().requires_grad_(wanted)))
