"""4-bit training on layers: equality of both computations, unbiased gradients, learned steps, packed codes."""

from __future__ import annotations

import copy
import io
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import gradbits as gb
from gradbits.core.errors import ArgumentError, ScaleAxisError
from gradbits.core.qtensor import QTensor
from gradbits.nn.matrix_products import LinearProducts
from gradbits.nn.sampling import sampled_product
from gradbits.quantizers.hadamard import Hadamard, HadamardBlocks
from gradbits.quantizers.householder import Householder
from gradbits.quantizers.lsq import step_gradient
from gradbits.quantizers.quantizer import Quantizer
from gradbits.recipes.recipe import GradInput, Output, Recipe

LAYERS = {
    "linear": (lambda: nn.Linear(32, 12), (40, 32)),
    "tokens": (lambda: nn.Linear(16, 8), (3, 12, 16)),
    "odd": (lambda: nn.Linear(7, 5, bias=False), (9, 7)),
    "conv1d": (lambda: nn.Conv1d(8, 6, 3, padding=1), (8, 8, 10)),
    "conv2d": (lambda: nn.Conv2d(8, 6, 3, stride=2), (8, 8, 7, 7)),
    "grouped": (lambda: nn.Conv2d(8, 8, 3, groups=4), (8, 8, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 3, 2), (6, 4, 3, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 4, 3, stride=2, output_padding=1), (6, 8, 4, 4)),
    "transposed_grouped": (lambda: nn.ConvTranspose2d(8, 4, 3, groups=2), (6, 8, 4, 4)),
}
OPTIONS = {
    "default": {},
    "no_sampling": {"sampling": False},
    "fixed": {"hadamard": 4, "learned_steps": False},
    "plain": {"hadamard": 1, "learned_steps": False, "sampling": False},
}


def problem(name: str, seed: int = 0) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    x.select(1 if x.dim() != 3 or name == "conv1d" else 2, 1).mul_(8)  # an outlier feature
    g = torch.randn(layer(x).shape) * torch.exp(torch.randn(shape[0], *(1,) * (x.dim() - 1)))
    return layer, x, g


def quantized(layer: nn.Module, compute: str = "auto", **options) -> nn.Module:
    layer = copy.deepcopy(layer)
    gb.quantize_(layer, gb.recipe("int4_transformer", **options), compute=compute)
    return layer


def gradients(layer: nn.Module, x: torch.Tensor, g: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y = layer(x)
    names = ["input", *(name for name, _ in layer.named_parameters())]
    found = torch.autograd.grad(y, (x, *layer.parameters()), g)
    return {"output": y.detach(), **dict(zip(names, found, strict=True))}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_simulated_equals_integer(name, options):
    layer, x, g = problem(name)
    both = [gradients(quantized(layer, compute, **options), x, g, 3) for compute in ("integer", "simulate")]
    assert both[0].keys() == both[1].keys()
    for key, value in both[0].items():
        assert torch.equal(value, both[1][key]), key
        assert bool(torch.isfinite(value).all())


@pytest.mark.parametrize("name", ["linear", "tokens", "conv2d", "grouped", "transposed"])
@pytest.mark.parametrize("options", [{}, {"sampling": False}, {"learned_steps": False}], ids=str)
def test_unbiased_for_the_quantized_forward(name, options):
    """Both gradients and those of the steps, over digits and rows: false alarm about 1e-5 per case."""
    layer, x, g = problem(name, 1)
    drawn = quantized(layer, **options)
    gradients(drawn, x, g, 0)  # the first batch starts the steps
    exact = copy.deepcopy(drawn)
    exact.assignment.recipe = replace(drawn.assignment.recipe, grad_input=None, grad_weight=None)
    want = gradients(exact, x, g, 0)
    draws = 120
    got = [gradients(drawn, x, g, seed) for seed in range(draws)]
    assert torch.equal(got[0]["output"], want["output"])
    for key in want.keys() - {"output", "bias"}:
        stack = torch.stack([d[key] for d in got]).double()
        error, spread = stack.mean(0) - want[key].double(), stack.var(0).div(draws).sqrt()
        spread = spread.clamp(min=float(spread.max()) / 5)
        limit = math.sqrt(2 * math.log(2 * error.numel() / 1e-6)) * 1.1  # the spread is an estimate itself
        assert bool((error.abs() <= limit * spread + 1e-5 * float(want[key].abs().max())).all()), key
    assert torch.equal(got[0].get("bias", x), want.get("bias", x))


def test_forward_is_the_rotated_four_bit_product():
    layer, x, _ = problem("linear")
    x = x.clone()
    x[:, 5] *= 20
    four = quantized(layer)
    y = four(x)
    size = int(four.quantizers.output_input_hadamard)
    assert size > 1
    turn = HadamardBlocks(size)

    def dense(value: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return torch.round(turn.forward(value) / step).clamp(-8, 7) * step

    q = four.quantizers
    expected = dense(x, q.output_input_step.detach()) @ dense(layer.weight, q.output_weight_step.detach()).t()
    torch.testing.assert_close(y, expected + layer.bias, rtol=1e-4, atol=1e-4)
    assert int(q.output_weight_hadamard) == size
    four(100 * torch.randn_like(x))
    assert int(q.output_input_hadamard) == size  # settled by the first batch


def test_step_gradients_follow_the_formula():
    layer, x, g = problem("linear")
    four = quantized(layer, sampling=False)
    gradients(four, x, g, 0)
    exact = copy.deepcopy(four)
    exact.assignment.recipe = replace(four.assignment.recipe, grad_input=None, grad_weight=None)
    got = gradients(exact, x, g, 0)
    q = four.quantizers
    turn = HadamardBlocks(int(q.output_input_hadamard))
    steps = {"input": q.output_input_step.detach(), "weight": q.output_weight_step.detach()}
    rotated = {"input": turn.forward(x), "weight": turn.forward(layer.weight.detach())}
    hat = {k: torch.round(rotated[k] / steps[k]).clamp(-8, 7) * steps[k] for k in steps}
    through = {"input": g @ hat["weight"], "weight": g.t() @ hat["input"]}
    for role, step in steps.items():
        grain = four.assignment.recipe.output.input.grain
        masked, of_step = step_gradient(rotated[role], step, through[role], (-8, 7), grain)
        torch.testing.assert_close(got[role], turn.inverse(masked), rtol=1e-4, atol=1e-4)
        found = got[f"quantizers.output_{role}_step"]
        torch.testing.assert_close(found, of_step.reshape(-1), rtol=1e-3, atol=1e-4 * float(through[role].abs().max()))


def test_steps_are_parameters_that_optimizers_train():
    layer, x, g = problem("linear")
    four = quantized(layer)
    names = [name for name, _ in four.named_parameters()]
    assert names == ["weight", "bias", "quantizers.output_input_step", "quantizers.output_weight_step"]
    four(x)  # starts the steps
    before = {name: p.detach().clone() for name, p in four.named_parameters()}
    opt = torch.optim.SGD(four.parameters(), lr=1e-2)
    four(x).backward(g)
    opt.step()
    for name, p in four.named_parameters():
        assert not torch.equal(p, before[name]), name


def test_input_steps_learn_even_where_the_input_needs_no_gradient():
    layer, x, g = problem("linear")
    four = quantized(layer)
    four(x).backward(g)
    assert float(four.quantizers.output_input_step.grad.abs()) > 0
    for p in (four.weight, four.bias, *four.quantizers.parameters()):
        p.requires_grad_(False)
    assert not four(x).requires_grad
    four.quantizers.output_weight_step.requires_grad_()
    four.quantizers.output_weight_step.grad = None
    four(x).backward(g)
    assert four.weight.grad is not None  # from before: nothing was added to a frozen weight
    assert float(four.quantizers.output_weight_step.grad.abs()) > 0


def test_checkpoints_keep_steps_and_never_start_them_again():
    layer, x, g = problem("linear")
    four = quantized(layer)
    gradients(four, x, g, 0)
    with torch.no_grad():
        four.quantizers.output_input_step.mul_(1.7)
    file = io.BytesIO()
    torch.save(four.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = quantized(layer)
    other.load_state_dict(state)
    a, b = gradients(four, 3 * x, g, 5), gradients(other, 3 * x, g, 5)
    for key, value in a.items():
        assert torch.equal(value, b[key]), key
    assert torch.equal(other.quantizers.output_input_step, four.quantizers.output_input_step)
    # a float checkpoint lacks them: it loads, and the next batch starts them
    fresh = quantized(layer)
    fresh.load_state_dict(layer.state_dict())
    fresh(x)
    assert int(fresh.quantizers.output_input_started) == 1


def test_evaluation_first_changes_nothing():
    layer, x, _ = problem("linear")
    four = quantized(layer).eval()
    y = four(x)
    assert int(four.quantizers.output_input_started) == 0
    assert int(four.quantizers.output_input_hadamard) == 0
    assert torch.equal(y, four.train()(x))  # the same batch then settles to the same values


def test_non_finite_batches_leave_steps_alone():
    layer, x, g = problem("linear")
    four = quantized(layer)
    bad = x.clone()
    bad[0, 0] = math.nan
    assert bool(torch.isnan(four(bad)).any())
    assert int(four.quantizers.output_input_started) == 0
    four(x)
    before = four.quantizers.output_input_step.detach().clone()
    g = g.clone()
    g[1, 1] = math.inf
    found = gradients(four, x, g, 0)
    assert not bool(torch.isfinite(found["weight"]).all())
    assert not bool(torch.isfinite(found["input"]).all())
    assert float(found["quantizers.output_input_step"]) == 0.0
    assert torch.equal(four.quantizers.output_input_step, before)


def test_codes_are_kept_two_to_a_byte():
    layer, x, _ = problem("linear")
    four = quantized(layer, learned_steps=False)
    sizes: list[tuple[torch.dtype, int]] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        sizes.append((t.dtype, t.numel()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        four(x.clone().requires_grad_())
    assert (torch.uint8, x.numel() // 2) in sizes
    assert (torch.uint8, layer.weight.numel() // 2) in sizes
    assert not any(dtype == torch.float32 and n > 16 for dtype, n in sizes)


def test_rows_that_were_not_drawn_are_not_computed():
    """The kernels see only kept rows, and in expectation half of the digits' rows."""
    torch.manual_seed(0)
    four = quantized(nn.Linear(16, 12))
    x = torch.randn(64, 16)
    g = torch.randn(64, 12) * torch.exp(torch.randn(64, 1))
    seen: dict[str, list[int]] = {"grad_input": [], "grad_weight": []}
    plain = LinearProducts.product

    class Counting(LinearProducts):
        def product(self, product, a, b, **rest):
            if product in seen:
                seen[product].append(a.codes.shape[0])
                if product == "grad_weight":
                    assert b.codes.shape[0] == a.codes.shape[0]
            return plain(self, product, a, b, **rest)

    four.products = Counting
    draws = 60
    for seed in range(draws):
        torch.manual_seed(seed)
        four(x.clone().requires_grad_()).backward(g)
    for product, rows in seen.items():
        assert sum(rows) / draws == pytest.approx(64, rel=0.08), product
    seen["grad_input"].clear()
    whole = quantized(four, sampling=False)
    whole.products = Counting
    whole(x.clone().requires_grad_()).backward(g)
    assert seen["grad_input"] == [64]


def test_sampling_costs_variance_only_where_rows_differ_little():
    layer, x, _ = problem("linear", 3)
    torch.manual_seed(0)
    g = torch.randn(40, 12)
    g[4:] *= 1e-3  # a few rows carry the gradient: all of them are kept
    total = []
    for sampling in (True, False):
        four = quantized(layer, sampling=sampling)
        gradients(four, x, g, 0)
        draws = torch.stack([gradients(four, x, g, seed)["weight"] for seed in range(80)])
        total.append(float(draws.double().var(0).sum()))
    assert total[0] < 1.5 * total[1]


def test_sampling_composes_with_a_rotation_of_rows():
    """A block Householder rotation of two digits, rows drawn after it: still unbiased."""
    torch.manual_seed(0)
    g = torch.randn(24, 6) * torch.exp(1.5 * torch.randn(24, 1))
    qw = Quantizer().quantize(torch.randn(6, 5))
    base = gb.recipe("int4_transformer")
    quantizer = replace(base.grad_input.gradient, rotation=Householder(fallback=False))
    from gradbits.core.noise import NoiseKey

    draws = torch.stack(
        [
            sampled_product(
                LinearProducts(),
                "grad_input",
                quantizer.quantize(g, noise=NoiseKey.of(seed, 2)),
                qw,
                torch.Size((24, 5)),
                rule=base.grad_input.sampling,
                noise=NoiseKey.of(seed, 6),
            )
            for seed in range(400)
        ]
    ).double()
    error = draws.mean(0) - (g @ qw.dequantize()).double()
    spread = draws.var(0).div(400).sqrt()
    assert float((error.abs() / spread.clamp(min=float(spread.max()) / 20)).max()) < 6


def test_attention_and_embeddings():
    net = nn.ModuleDict({"embed": nn.Embedding(5, 8), "query": nn.Linear(8, 8), "product": gb.nn.Matmul()})
    report = gb.quantize_(net, "int4_transformer")
    assert [row.name for row in report.quantized] == ["query"]
    assert report.quantized[0].grad_weight == "4+4×4"
    reasons = {row.name: row.reason for row in report.left_alone}
    assert "no product" in reasons["embed"]
    assert "matmul=False" in reasons["product"]
    report = gb.quantize_(net, gb.recipe("int4_transformer", attention="int8_dynamic"))
    assert {row.name: row.recipe for row in report.quantized}["product"] == "int8_dynamic"
    a, b = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 4, 3, requires_grad=True)
    net["product"](a, b).sum().backward()
    assert bool(torch.isfinite(a.grad).all())


def test_a_rotation_of_one_operand_is_refused():
    plain, turned = Quantizer(), Quantizer(rotation=Hadamard(size=8))
    for output in (Output(input=turned, weight=plain), Output(input=plain, weight=turned)):
        with pytest.raises(ScaleAxisError, match="output sums over axis 1"):
            Recipe(name="wrong", output=output)
    other = Quantizer(rotation=Hadamard(size=4))
    with pytest.raises(ScaleAxisError):
        Recipe(name="wrong", output=Output(input=turned, weight=other))
    Recipe(name="right", grad_input=GradInput(gradient=plain, weight=turned))  # along an axis of the result
    q = plain.quantize(torch.randn(4, 8))
    turned_q = QTensor(codes=q.codes, scale=q.scale, bits=8, shape=q.shape, rotation=HadamardBlocks(8))
    with pytest.raises(ScaleAxisError, match="not rotated the same way"):
        LinearProducts().product("output", q, turned_q)
    # and along the result's axis it is rotated back
    g = plain.quantize(torch.randn(3, 4))
    got = LinearProducts().product("grad_input", g, turned_q)
    torch.testing.assert_close(got, g.dequantize() @ turned_q.dequantize(), rtol=1e-4, atol=1e-4)
    kept = LinearProducts().product("grad_input", g, turned_q, keep=("weight",))
    torch.testing.assert_close(HadamardBlocks(8).inverse(kept), got)


def test_options_are_checked_and_travel():
    for options in ({"hadamard": 3}, {"keep": 0.0}, {"attention": "int4"}):
        with pytest.raises(ArgumentError):
            gb.recipe("int4_transformer", **options)
    recipe = gb.recipe("int4_transformer", hadamard=16, keep=0.25)
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert recipe.with_overrides({"grad_input.sampling": None}).grad_input.sampling is None


def test_it_trains():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))
    gb.quantize_(net, "int4_transformer")
    x = torch.randn(128, 16)
    y = (x[:, :4] * 2).argmax(1)
    opt = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(net(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]
