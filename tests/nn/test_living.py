"""Quantized layers among PyTorch's other features."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import gradbits as gb
from gradbits.core.errors import DoubleBackwardError
from gradbits.nn.layers import QuantizedLinear
from gradbits.nn.quantized import Quantized


def small(recipe: str | gb.Recipe = "int8_dynamic", **options) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 3))
    if isinstance(recipe, str):
        recipe = gb.recipe(recipe, **options)
    gb.quantize_(net, recipe.with_overrides({"keep_float": ()}))
    return net


X = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(1))
EVERY = pytest.mark.parametrize("name", gb.recipes())


def backward(net: nn.Module, x: torch.Tensor = X, seed: int = 0) -> list[torch.Tensor]:
    net.zero_grad()
    torch.manual_seed(seed)
    net(x).square().mean().backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@EVERY
def test_deepcopy_is_independent_and_equal(name):
    net = small(name)
    backward(net)
    twin = copy.deepcopy(net)
    assert equal(backward(net, seed=3), backward(twin, seed=3))
    before = copy.deepcopy(net.state_dict())
    backward(twin, X * 5)
    gb.quantize_(twin, "int8_dynamic", compute="simulate")
    assert all(torch.equal(v.nan_to_num(-7), before[k].nan_to_num(-7)) for k, v in net.state_dict().items())
    assert net[3].assignment.recipe.name == name


@EVERY
def test_a_whole_model_can_be_saved(name):
    net = small(name)
    backward(net)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert gb.report(loaded) == gb.report(net)
    assert equal(backward(net, seed=4), backward(loaded, seed=4))
    assert equal(backward(pickle.loads(pickle.dumps(net)), seed=4), backward(loaded, seed=4))


def test_tied_weights_collect_both_gradients():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 8), nn.Linear(8, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, i: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(i))

    torch.manual_seed(0)
    net = Tied()
    index = torch.arange(7)
    net(index).square().mean().backward()
    want = net.embed.weight.grad.clone()
    net.zero_grad()
    gb.quantize_(net, "int8_dynamic")
    assert net.head.weight is net.embed.weight
    assert len(list(net.parameters())) == 1
    net(index).square().mean().backward()
    assert float((net.embed.weight.grad - want).norm() / want.norm()) < 0.05


def test_frozen_parameters_get_no_gradient_and_cost_none(monkeypatch):
    net = small()
    net[3].weight.requires_grad_(False)
    net[0].requires_grad_(False)
    computed = []
    original = type(net[3].products(())).product

    def record(self, product, *args, **kwargs):
        computed.append(product)
        return original(self, product, *args, **kwargs)

    monkeypatch.setattr("gradbits.nn.bilinear.Bilinear.product", record)
    backward(net)
    assert computed.count("output") == 3
    assert computed.count("grad_weight") == 1  # the last layer only
    assert computed.count("grad_input") == 1  # the first linear layer's input leads to nothing that learns
    assert net[3].weight.grad is None
    assert net[3].bias.grad is not None
    assert net[0].weight.grad is None


def test_no_grad_keeps_nothing():
    net = small()
    with torch.no_grad():
        y = net(X)
    assert not y.requires_grad
    with torch.inference_mode():
        assert torch.equal(net.eval()(X), y)


def test_evaluation_draws_no_noise_and_updates_no_range():
    net = small("unified_int8", activation_range="ema")
    backward(net)
    net.eval()
    state, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        net(X * 100)
    assert torch.equal(torch.get_rng_state(), rng)
    net(X * 100).sum().backward()  # a saliency map, say: noise is drawn, ranges stay
    assert all(torch.equal(v.nan_to_num(-7), state[k].nan_to_num(-7)) for k, v in net.state_dict().items())


def test_unused_layers():
    net = small()
    net.add_module("spare", nn.Linear(3, 3))
    gb.quantize_(net, "int8_dynamic")
    loss = nn.Sequential(*list(net)[:-1])(X).sum()
    loss.backward()
    assert net.spare.weight.grad is None


def test_gradients_accumulate():
    net = small()
    torch.manual_seed(0)
    parts = []
    for x in (X[:3], X[3:]):
        net.zero_grad()
        net(x).sum().backward()
        parts.append([p.grad.clone() for p in net.parameters()])
    net.zero_grad()
    torch.manual_seed(0)
    for x in (X[:3], X[3:]):
        net(x).sum().backward()
    assert equal([p.grad for p in net.parameters()], [a + b for a, b in zip(*parts, strict=True)])


@EVERY
def test_differentiating_twice_is_refused_by_name(name):
    net = small(name)
    x = X.clone().requires_grad_()
    with pytest.raises(DoubleBackwardError, match=r"layer '4' is quantized and cannot be differentiated twice"):
        torch.autograd.grad(net(x).sum(), x, create_graph=True)


def test_hooks_keep_firing():
    net, fired = small("int8_dynamic"), []
    gb.dequantize_(net)
    layer = net[3]
    layer.register_forward_pre_hook(lambda m, i: fired.append("pre"))
    layer.register_forward_hook(lambda m, i, o: fired.append("forward"))
    layer.register_full_backward_pre_hook(lambda m, g: fired.append("backward pre"))
    layer.register_full_backward_hook(lambda m, gi, go: fired.append("backward"))
    layer.weight.register_hook(lambda g: fired.append("weight"))
    gb.quantize_(net, "int8_dynamic")
    backward(net)
    assert sorted(fired) == ["backward", "backward pre", "forward", "pre", "weight"]


def test_functional_call():
    net = small()
    parameters = {n: (p * 2).detach().requires_grad_() for n, p in net.named_parameters()}
    doubled = copy.deepcopy(net)
    with torch.no_grad():
        for p in doubled.parameters():
            p.mul_(2)
    torch.manual_seed(0)
    y = torch.func.functional_call(net, parameters, (X,))
    grads = torch.autograd.grad(y.square().mean(), list(parameters.values()))
    assert equal(list(grads), backward(doubled))


def test_lazy_layers_after_their_first_batch():
    net = nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 2))
    assert {r.name for r in gb.quantize_(net, "int8_dynamic").quantized} == {"1"}
    net(torch.randn(3, 7))
    assert not gb.quantize_(net, "int8_dynamic").left_alone
    assert net[0](torch.randn(3, 7)).shape == (3, 5)


def test_a_parametrization_on_top_of_a_quantized_layer():
    layer = nn.Linear(4, 3)
    gb.quantize_(layer, "int8_dynamic")
    parametrizations.weight_norm(layer)
    layer(torch.randn(5, 4)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert "Quantized" in type(layer).__mro__[1].__name__


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@EVERY
def test_autocast(name, dtype):
    net, plain = small(name), small(name)
    gb.dequantize_(plain)
    x = X.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y, want = net(x), plain(X)
        assert y.dtype == want.dtype == dtype
        loss = y.float().square().mean()
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())
    assert x.grad.dtype == torch.float32
    assert bool(torch.isfinite(x.grad).all())
    limit = 0.8 if name == "ewgs" else 0.5  # its default is 2 bits, on intervals that have not learned yet
    assert float((y - want).detach().float().norm() / want.detach().float().norm()) < limit


def test_optimizers_built_before_keep_working():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    opt = torch.optim.AdamW(net.parameters(), lr=0.02)
    x, y = torch.randn(64, 16), torch.randint(0, 2, (64,))
    gb.quantize_(net, "int8_dynamic")
    losses = []
    for _ in range(15):
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # raised inside of torch
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, request):
    """Graph breaks are allowed, failures are not; the numbers are those of eager execution."""
    if backend == "inductor":
        request.getfixturevalue("inductor")
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    gb.quantize_(net, gb.recipe("unified_int8", keep_float=(), activation_range="ema"))
    twin = copy.deepcopy(net)
    torch._dynamo.reset()
    compiled, x = torch.compile(net, backend=backend), torch.randn(5, 8)
    for step in range(3):
        results = []
        for module, owner in ((compiled, net), (twin, twin)):
            owner.zero_grad()
            torch.manual_seed(step)
            y = module(x)
            y.square().sum().backward()
            results.append([y.detach(), *(p.grad.clone() for p in owner.parameters()), *owner.buffers()])
        assert equal(*results)
    assert all(isinstance(m, QuantizedLinear) for m in net if isinstance(m, Quantized))
    torch._dynamo.reset()
