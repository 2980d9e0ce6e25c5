"""Bits of a gradient element, averaged over what enters the backward products."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradbits as gb
from gradbits.observe import gradient_bits


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 24))


def test_float_counts_the_bits_of_the_output() -> None:
    net = network()
    assert gradient_bits(net, lambda: net(torch.ones(2, 8))) == 32
    half = network().to(torch.bfloat16)
    assert gradient_bits(half, lambda: half(torch.ones(2, 8, dtype=torch.bfloat16))) == 16


def test_weighted_by_the_elements_of_each_gradient() -> None:
    net = network()
    gb.quantize_(net, {"0": "int8_dynamic", "*": None})
    assert gradient_bits(net, lambda: net(torch.ones(2, 8))) == pytest.approx((8 * 8 + 24 * 32) / 32)


def test_both_products_count() -> None:
    net = network()
    recipe = gb.recipe("int8_dynamic").with_overrides({"grad_input.gradient.bits": 4})
    gb.quantize_(net, recipe)
    assert gradient_bits(net, lambda: net(torch.ones(2, 8))) == 6
    gb.quantize_(net, recipe.with_overrides({"grad_weight": None}))
    assert gradient_bits(net, lambda: net(torch.ones(2, 8))) == 18


def test_hooks_are_removed_even_after_an_error() -> None:
    net = network()
    with pytest.raises(RuntimeError):
        gradient_bits(net, lambda: net(torch.ones(2, 9)))
    assert all(not m._forward_hooks for m in net.modules())


def test_a_model_without_layers_is_float() -> None:
    net = nn.ReLU()
    assert gradient_bits(net, lambda: net(torch.ones(2))) == 32


def test_digits_count_each_and_rows_that_are_not_drawn_do_not() -> None:
    for sampling, bits in ((False, 8), (True, 4)):
        net = network()
        gb.quantize_(net, gb.recipe("int4_transformer", sampling=sampling))
        assert gradient_bits(net, lambda net=net: net(torch.ones(2, 8))) == bits
    net = network()
    gb.quantize_(net, gb.recipe("int4_transformer", keep=0.25))
    assert gradient_bits(net, lambda: net(torch.ones(2, 8))) == 2
