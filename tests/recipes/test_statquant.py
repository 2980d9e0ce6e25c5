"""StatQuant on layers: integer equals simulated, gradients are unbiased for the quantized forward, variance falls."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import gradbits as gb
from gradbits.core.errors import ArgumentError, NothingToQuantizeError, ScaleAxisError
from gradbits.nn.matrix_products import LinearProducts
from gradbits.quantizers.householder import Householder
from gradbits.quantizers.quantizer import Quantizer
from gradbits.recipes.recipe import GradWeight, Recipe

METHODS = ("statquant_ptq", "statquant_psq", "statquant_bhq")
LAYERS = {
    "linear": (lambda: nn.Linear(10, 7), (12, 10)),
    "tokens": (lambda: nn.Linear(6, 5), (3, 4, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (6, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (5, 4, 6, 6)),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2, stride=2), (4, 4, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1, bias=False), (4, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (4, 2, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1), (4, 4, 5, 5)),
}


def gradients(layer: nn.Module, x: torch.Tensor, g: torch.Tensor, seed: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y = layer(x)
    return (y.detach(), *torch.autograd.grad(y, (x, layer.weight), g))


def problem(name: str, seed: int = 0) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    g = torch.randn(layer(x).shape) * torch.exp(torch.randn(shape[0], *(1,) * (x.dim() - 1)))
    return layer, x, g


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("method", METHODS)
def test_simulated_equals_integer(method, name):
    layer, x, g = problem(name)
    results = []
    for compute in ("integer", "simulate"):
        quantized = copy.deepcopy(layer)
        gb.quantize_(quantized, gb.recipe(method, gradient_bits=4), compute=compute)
        results.append(gradients(quantized, x, g, 3))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["linear", "tokens", "conv2d", "grouped", "transposed"])
@pytest.mark.parametrize("method", METHODS)
def test_unbiased_for_the_quantized_forward(method, name):
    """Mean over draws minus the exact gradient of the same quantized forward: false alarm below 1e-5 per case."""
    layer, x, g = problem(name, 1)
    recipe = gb.recipe(method, gradient_bits=4)
    exact, drawn = copy.deepcopy(layer), copy.deepcopy(layer)
    gb.quantize_(exact, replace(recipe, grad_input=None, grad_weight=None))
    gb.quantize_(drawn, recipe)
    want = gradients(exact, x, g, 0)
    draws = 200
    got = [gradients(drawn, x, g, seed) for seed in range(draws)]
    assert torch.equal(got[0][0], want[0])
    for index in (1, 2):
        stack = torch.stack([draw[index] for draw in got]).double()
        error = stack.mean(0) - want[index].double()
        spread = stack.var(0).div(draws).sqrt()
        limit = math.sqrt(2 * math.log(2 * error.numel() / 1e-6))
        assert bool((error.abs() <= limit * spread + 2e-5 * float(want[index].abs().max())).all())
        # chi-square of the whole array: a bias far below one element's noise would still show
        assert float((error / spread.clamp(min=1e-12)).square().mean()) < 1.0 + 6.0 * math.sqrt(3.0 / error.numel())


def test_both_uses_of_the_gradient_draw_their_own_noise():
    layer, x, _ = problem("linear")
    gb.quantize_(layer, gb.recipe("statquant_ptq", gradient_bits=8))
    g = torch.randn(12, 7)
    call_noise = []
    layer_run = layer.run

    def spy(*args):
        y = layer_run(*args)
        call_noise.append(y.grad_fn.call)
        return y

    layer.run = spy
    layer(x.requires_grad_()).backward(g)
    call = call_noise[0]
    first, _ = call.quantize("grad_input", "gradient", g, False)
    second, _ = call.quantize("grad_weight", "gradient", g, False)
    assert torch.equal(first.scale, second.scale)
    assert not torch.equal(first.codes, second.codes)


def test_variance_falls_from_tensor_to_row_to_block():
    layer, x, g = problem("linear", 2)
    g[3] *= 200
    spread = []
    for method in METHODS:
        quantized = copy.deepcopy(layer)
        gb.quantize_(quantized, gb.recipe(method, gradient_bits=4))
        draws = torch.stack([gradients(quantized, x, g, seed)[1] for seed in range(200)])
        spread.append(float(draws.double().var(0).sum()))
    assert spread[0] > 1.5 * spread[1] > 3.0 * spread[2]


@pytest.mark.parametrize("bits", range(2, 9))
def test_gradient_bits(bits):
    layer, x, g = problem("conv2d")
    gb.quantize_(layer, gb.recipe("statquant_bhq", gradient_bits=bits))
    assert layer.assignment.recipe.grad_input.gradient.bits == bits
    for value in gradients(layer, x, g, 0):
        assert bool(torch.isfinite(value).all())


def test_rows_of_samples_share_a_scale():
    layer, x, g = problem("tokens")
    torch.manual_seed(0)
    for method in ("statquant_psq", "statquant_bhq"):
        by_sample = copy.deepcopy(layer)
        gb.quantize_(by_sample, gb.recipe(method, gradient_bits=4, rows="sample"))
        flat = copy.deepcopy(layer)
        gb.quantize_(flat, gb.recipe(method, gradient_bits=4, rows="token"))
        a, b = gradients(by_sample, x, g, 0), gradients(flat, x, g, 0)
        assert torch.equal(a[0], b[0])
        assert not torch.equal(a[1], b[1])
        reference = gradients(copy.deepcopy(layer), x, g, 0)[1]
        assert float((a[1] - reference).norm() / reference.norm()) < 0.5


def test_attention_products():
    torch.manual_seed(0)
    for method in METHODS:
        product = gb.nn.Matmul()
        report = gb.quantize_(product, gb.recipe(method, gradient_bits=8))
        assert report.quantized[0].recipe == ("statquant_psq" if method == "statquant_bhq" else method)
        a, b = torch.randn(3, 5, 4, requires_grad=True), torch.randn(3, 4, 6, requires_grad=True)
        y = product(a, b)
        g = torch.randn_like(y)
        grads = torch.autograd.grad(y, (a, b), g)
        exact = torch.autograd.grad(a @ b, (a, b), g)
        for got, want in zip(grads, exact, strict=True):
            assert float((got - want).norm() / want.norm()) < 0.05
    # a rotation over the batch of matrices is refused with its reason
    rotated = replace(gb.recipe("statquant_bhq"), matmul=True)
    with pytest.raises(NothingToQuantizeError, match="mix the matrices"):
        gb.quantize_(gb.nn.Matmul(), rotated)


def test_a_rotation_of_the_summed_axis_is_refused():
    gradient = Quantizer(rotation=Householder(), rounding="stochastic")
    with pytest.raises(ScaleAxisError, match="grad_weight sums over axis 0"):
        Recipe(name="wrong", grad_weight=GradWeight(gradient=gradient, input=Quantizer()))
    q = gradient.quantize(torch.randn(8, 3))
    with pytest.raises(ScaleAxisError, match="sums over"):
        LinearProducts().product("grad_weight", q, Quantizer().quantize(torch.randn(8, 4)))


def test_options_are_checked():
    for options in ({"gradient_bits": 9}, {"gradient_bits": 1}, {"rows": "pixel"}, {"grad_weight_grain": "row"}):
        with pytest.raises(ArgumentError):
            gb.recipe("statquant_bhq", **options)
    per_channel = gb.recipe("statquant_psq", grad_weight_grain="channel")
    assert per_channel.grad_weight.gradient.grain.axis == 1
    assert Recipe.from_json(gb.recipe("statquant_bhq").to_json()) == gb.recipe("statquant_bhq")


def test_recipe_trains_a_small_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3))
    gb.quantize_(net, gb.recipe("statquant_bhq", gradient_bits=4))
    x = torch.randn(48, 1, 6, 6)
    y = (x.mean((1, 2, 3)) * 8).clamp(-1, 1).round().long() + 1
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(25):
        loss = nn.functional.cross_entropy(net(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
