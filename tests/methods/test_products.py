"""What every recipe's products promise, for each line of the method table and each kind of layer.

The unbiasedness test is a z-test that fails an honest recipe with probability 1e-6 on a fresh seed; seeds are fixed.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from table import LAYERS, METHODS, PAIRS, each_method, each_pair, problems, same, setup
from torch import nn

import gradbits as gb
from gradbits.core.errors import NothingToQuantizeError
from gradbits.recipes.recipe import Output, Recipe

ALARM = 1e-6
CLAIMED = [(m, layer) for m, layer in PAIRS if gb.recipes()[m.name].unbiased]


def run(module: nn.Module, inputs: tuple[torch.Tensor, ...], seed: int = 0, grad: torch.Tensor | None = None):
    """Return output and all gradients by name; ``grad`` defaults to one of uneven rows, drawn under a fixed seed."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    torch.manual_seed(seed)
    y = module(*inputs)
    if grad is None:
        rng = torch.Generator().manual_seed(7)
        rows = torch.exp(torch.randn(y.shape[0], *(1,) * (y.dim() - 1), generator=rng))
        grad = (torch.randn(y.shape, generator=rng) * rows).to(y.dtype)
    tensors = (*inputs, *parameters.values())
    grads = torch.autograd.grad(y, tensors, grad, allow_unused=True)
    names = [*(f"input{i}" for i in range(len(inputs))), *parameters]
    return {"output": y.detach(), **{n: g for n, g in zip(names, grads, strict=True) if g is not None}}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300))


def test_the_table_is_complete():
    missing = set(gb.recipes()) - {m.name for m in METHODS}
    assert not missing, f"add a line to METHODS for {sorted(missing)}"
    assert len({str(m) for m in METHODS}) == len(METHODS)


@each_method
def test_it_is_published_and_travels_as_json(method):
    recipe = gb.recipe(method.name, **method.options)
    assert recipe.name == method.name
    assert Recipe.from_json(recipe.to_json()) == recipe


@each_method
def test_what_is_quantized(method):
    for layer in LAYERS:
        module = problems()[layer][0]
        if layer in method.leaves:
            with pytest.raises(NothingToQuantizeError, match=method.name):
                gb.quantize_(module, method.recipe())
        else:
            (row,) = gb.quantize_(module, method.recipe()).rows
            assert (row.recipe, row.reason) == (method.recipe(layer).name, "")


@each_pair
def test_simulated_equals_integer(method, layer):
    inputs = problems()[layer][1]
    a, b = (setup(method, layer, compute) for compute in ("integer", "simulate"))
    for seed in (1, 2):  # the second step meets the states of the first
        assert same(run(a, inputs, seed), run(b, inputs, seed))


@each_pair
def test_close_to_float(method, layer):
    float_layer, inputs = problems()[layer]
    got, want = run(setup(method, layer), inputs), run(float_layer, inputs)
    for name, value in want.items():
        assert distance(got[name], value) < method.error, name


@pytest.mark.parametrize(("method", "layer"), CLAIMED, ids=str)
def test_gradients_are_unbiased_where_claimed(method, layer):
    inputs, draws = problems()[layer][1], 200
    module = setup(method, layer)
    run(module, inputs)  # settles what is decided once
    recipe = method.recipe(layer)
    forward_only = replace(recipe, grad_input=None, grad_weight=None)
    if method.own_operands:  # the operands that the backward products multiply with, in place of the forward's
        own = Output(input=recipe.grad_weight.input, weight=recipe.grad_input.weight)
        forward_only = replace(forward_only, output=own)
    states = copy.deepcopy(module.state_dict())
    exact = setup(method, layer, recipe=forward_only)
    exact.load_state_dict({k: v for k, v in states.items() if k in exact.state_dict()})
    exact.eval()
    want = run(exact, inputs)
    module.eval()
    found: dict[str, list[torch.Tensor]] = {}
    for seed in range(draws):
        for name, value in run(module, inputs, seed).items():
            found.setdefault(name, []).append(value)
    assert all(torch.equal(y, want["output"]) for y in found.pop("output")) is not method.own_operands
    for name, values in found.items():
        if name not in want or name == "bias":
            continue
        sample, truth = torch.stack(values).double().flatten(1), want[name].double().flatten()
        sample = torch.cat([sample, (sample @ truth)[:, None] / truth.norm()], dim=1)  # also along the true gradient
        truth = torch.cat([truth, truth.norm()[None]])
        deviation, error = sample.std(0), (sample.mean(0) - truth).abs()
        moves = deviation > 1e-6 * truth.abs().max()
        z = error[moves] / (deviation[moves] / draws**0.5)
        if not gb.recipes()[method.name].factory(**method.options).is_stochastic:
            assert all(torch.equal(value, want[name]) for value in values), name
            continue
        assert float(z.max()) < stats.t.isf(ALARM / 2 / z.numel(), draws - 1), name
        assert float(error[~moves].sum()) < 1e-4 * float(truth.abs().max()), name


DEGENERATE = {
    "zero": torch.zeros_like,
    "constant": lambda x: torch.full_like(x, 0.3),
    "tiny": lambda x: x * 1e-30,
    "huge": lambda x: x * 1e30,
    "one sample": lambda x: x[:1],
    "no sample": lambda x: x[:0],
    "one spike": lambda x: x * 1e-6 + F.one_hot(torch.tensor(1), x.numel()).view(x.shape) * 50.0,
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@each_pair
@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_input(method, layer, kind):
    float_layer, inputs = problems()[layer]
    if kind == "huge" and layer == "matmul":
        inputs = (DEGENERATE[kind](inputs[0]), inputs[1])  # both would overflow in float as well
    else:
        inputs = tuple(DEGENERATE[kind](x) for x in inputs)
    for size in (1.0, 0.0, 1e-30 if kind != "tiny" else 1.0):
        g = torch.randn(float_layer(*inputs).shape, generator=torch.Generator().manual_seed(1)) * size
        got, want = run(setup(method, layer), inputs, grad=g), run(float_layer, inputs, grad=g)
        for name, value in want.items():
            assert got[name].shape == value.shape
            assert bool(torch.isfinite(got[name]).all()), name
            if size and kind not in ("zero", "one spike", "no sample"):
                limit = float(value.abs().max()) * max(8 * method.error, 0.8) + 1e-37
                assert float((got[name] - value).abs().max()) <= limit, name
            elif not size and name != "output":
                assert not got[name].any(), name


@each_pair
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(method, layer, dtype):
    inputs = tuple(x.to(dtype) for x in problems()[layer][1])
    module = setup(method, layer).to(dtype)
    got, want = run(module, inputs), run(problems()[layer][0], tuple(x.float() for x in inputs))
    for name, value in want.items():
        assert got[name].dtype == dtype
        assert distance(got[name], value) < method.error + 0.02, name


@each_pair
def test_seed_and_threads_decide_everything(method, layer):
    inputs, recipe = problems()[layer][1], method.recipe(layer)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            module = setup(method, layer)
            results.append([run(module, inputs, seed) for seed in (1, 1, 2)])
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*results, strict=True):
        if recipe.grad_input is None or recipe.grad_weight is None:  # torch's float products round by the thread count
            assert torch.equal(a["output"], b["output"])
            assert all(torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-5) for name in a)
        else:
            assert same(a, b)
    again, after = (run(setup(method, layer), inputs, seed) for seed in (1, 2))
    assert same(again, results[0][0])
    assert same(again, after) is not recipe.is_stochastic


def untouched(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], operands: tuple[str, ...]) -> None:
    """Nothing turned bad, and the states of ``operands`` are what they were, those of finite channels included."""
    for name, old in before.items():
        new = after[name]
        assert bool(torch.isfinite(new[torch.isfinite(old)]).all()), name
        if name.split(".")[-1].startswith(operands):
            assert torch.equal(old.nan_to_num(-7), new.nan_to_num(-7)), name


@each_pair
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_state_is_untouched_by_what_is_not_finite(method, layer, bad):
    inputs, module = problems()[layer][1], setup(method, layer)
    poisoned = tuple(x.clone() for x in inputs)
    poisoned[0].view(-1)[3] = bad
    for started in (False, True):
        if started:
            run(module, inputs)
        before = copy.deepcopy(module.state_dict())
        assert not bool(torch.isfinite(run(module, poisoned)["output"]).all())
        untouched(before, module.state_dict(), ("output_input", "grad_weight_input"))
    g = torch.ones_like(run(module, inputs)["output"])
    g.view(-1)[0] = bad
    before = copy.deepcopy(module.state_dict())
    for name, value in run(module, inputs, grad=g).items():
        if name.startswith("quantizers."):  # a learned step must survive the optimizer step that follows
            assert bool(torch.isfinite(value).all()), name
        elif name != "output":
            assert not bool(torch.isfinite(value).all()), name
    untouched(before, module.state_dict(), ("grad_input_gradient", "grad_weight_gradient"))
