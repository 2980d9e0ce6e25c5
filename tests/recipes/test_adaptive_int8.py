"""Distribution-Adaptive INT8 on layers."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import gradbits as gb
from gradbits.core.errors import ArgumentError, ScaleAxisError
from gradbits.core.grain import PerChannel
from gradbits.quantizers.grids import Symmetric
from gradbits.quantizers.quantizer import Quantizer
from gradbits.recipes.recipe import GradInput, Recipe

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (32, 6)),
    "conv2d": (lambda: nn.Conv2d(3, 5, 3, padding=1), (6, 3, 7, 7)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 4, 6, 6)),
    "depthwise": (lambda: nn.Conv1d(4, 4, 3, groups=4), (4, 4, 12)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (3, 2, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 2, stride=2), (3, 3, 5, 5)),
}


def recipe(**options) -> Recipe:
    return gb.recipe("adaptive_int8", keep_float=(), **options)


def problem(name: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    y = layer(x)
    size = torch.logspace(-3, 1, y.shape[1]).view(1, -1, *(1,) * (y.dim() - 2))
    return layer, x, torch.randn(y.shape) * size


def gradients(layer: nn.Module, x: torch.Tensor, g: torch.Tensor, seed: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y = layer(x)
    return (y.detach(), *torch.autograd.grad(y, (x, layer.weight), g))


@pytest.mark.parametrize("name", LAYERS)
def test_simulated_equals_integer_and_the_products_of_the_values(name):
    layer, x, g = problem(name)
    results = []
    for compute in ("integer", "simulate"):
        quantized = copy.deepcopy(layer)
        gb.quantize_(quantized, recipe(), compute=compute)
        results.append(gradients(quantized, x, g, 3))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    # the integer weight gradient is the float one of the dequantized operands, channel scales and all
    call = call_of(layer, x)
    qg = call.quantize("grad_weight", "gradient", g, False)[0]
    assert qg.scale.numel() == g.shape[1]
    qx = call.quantize("grad_weight", "input", x, False)[0]
    exact = call.products.in_float("grad_weight", qg.dequantize().double(), qx.dequantize().double())
    got = call.products.product("grad_weight", qg, qx)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6 * float(exact.abs().max()))


def call_of(layer: nn.Module, x: torch.Tensor):
    """What a call of the layer with fresh states works with."""
    fresh = copy.deepcopy(layer)
    gb.quantize_(fresh, recipe())
    y = fresh(x.clone().requires_grad_())
    node = y.grad_fn
    while not hasattr(node, "call"):
        node = node.next_functions[0][0]
    return node.call


@pytest.mark.parametrize("name", ["linear", "conv2d", "depthwise"])
def test_unbiased_while_nothing_clips(name):
    """With every channel Gaussian, s = max|g| and both gradients are unbiased: false alarm below 1e-5."""
    layer, x, g = problem(name)
    chosen = recipe(threshold=0.0)
    exact, drawn = copy.deepcopy(layer), copy.deepcopy(layer)
    gb.quantize_(exact, replace(chosen, grad_input=None, grad_weight=None))
    gb.quantize_(drawn, chosen)
    want, draws = gradients(exact, x, g, 0), 150
    got = [gradients(drawn, x, g, seed) for seed in range(draws)]
    for index in (1, 2):
        stack = torch.stack([d[index] for d in got]).double()
        error, spread = stack.mean(0) - want[index].double(), stack.var(0).div(draws).sqrt()
        limit = math.sqrt(2 * math.log(2 * error.numel() / 1e-6))
        spread = spread.clamp(min=float(spread.max()) / 5)  # elements that hardly ever move have no normal mean
        assert bool((error.abs() <= limit * spread + 1e-5 * float(want[index].abs().max())).all())


def test_channel_scales_never_raise_the_variance():
    layer, x, g = problem("conv2d")
    spread = []
    for vectorized in (True, False):
        quantized = copy.deepcopy(layer)
        gb.quantize_(quantized, recipe(vectorized=vectorized, threshold=0.0))
        draws = torch.stack([gradients(quantized, x, g, seed)[2] for seed in range(120)])
        spread.append(draws.double().var(0).sum(dim=(1, 2, 3)))
    # the smallest channel is 10,000 times smaller than the largest: one scale for all is noise to it
    assert float(spread[0][0]) < 1e-4 * float(spread[1][0])
    assert float(spread[0].sum()) < 1.1 * float(spread[1].sum())


def test_rounding_error_is_bounded():
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    nearest = recipe(rounding="nearest", threshold=0.0).grad_weight.gradient
    q = nearest.quantize(x, state=nearest.init_state(8))
    assert bool(((q.dequantize() - x).abs() <= q.scale / 2 * (1 + 1e-5)).all())
    stochastic = recipe(threshold=0.0).grad_weight.gradient
    draws = torch.stack([stochastic.quantize(x, state=stochastic.init_state(8)).dequantize() for _ in range(300)])
    bound = x.abs().amax(0).square() / 64_516
    assert bool((draws.var(0) <= 1.4 * bound).all())


def test_state_travels_in_the_checkpoint():
    layer, x, g = problem("conv2d")
    layer.train()
    quantized = copy.deepcopy(layer)
    gb.quantize_(quantized, recipe())
    gradients(quantized, x, g, 0)
    state = quantized.state_dict()
    clip = state["quantizers.grad_weight_gradient_clip"]
    assert clip.shape == (5,)
    assert bool(torch.isfinite(clip).all())
    other = copy.deepcopy(layer)
    gb.quantize_(other, recipe())
    other.load_state_dict(state)
    for a, b in zip(gradients(quantized, x, 2 * g, 1), gradients(other, x, 2 * g, 1), strict=True):
        assert torch.equal(a, b)


def test_channel_scales_are_refused_for_grad_input():
    by_channel = Quantizer(grid=Symmetric(), grain=PerChannel(axis=1))
    with pytest.raises(ScaleAxisError):
        Recipe(name="wrong", grad_input=GradInput(gradient=by_channel, weight=Quantizer()))


def test_grouped_transposed_convolution_stays_in_float_with_its_reason():
    net = nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, groups=4))
    report = gb.quantize_(net, recipe())
    assert [row.name for row in report.quantized] == ["1"]
    assert "runs across the groups" in report.left_alone[0].reason


def test_paper_defaults_and_options():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    report = gb.quantize_(net, "adaptive_int8")
    assert [row.name for row in report.quantized] == ["1"]
    assert gb.recipe("adaptive_int8", grad_input_range="clip").grad_input.gradient.range.can_clip
    assert Recipe.from_json(recipe(rule="exact").to_json()) == recipe(rule="exact")
    with pytest.raises(ArgumentError):
        gb.recipe("adaptive_int8", grad_input_range="sometimes")
    with pytest.raises(ArgumentError):
        gb.recipe("adaptive_int8", threshold=2.0)
