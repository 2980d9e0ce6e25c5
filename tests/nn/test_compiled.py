"""``torch.compile`` keeps quantized layers in one graph, with the numbers of eager execution."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradbits as gb
from gradbits.nn import compiled as module
from gradbits.train.models import build_model

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # raised inside of torch


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Attention(nn.Module):
    """Products of two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.matmul = nn.Linear(12, 24), gb.nn.Matmul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = self.qk(x).chunk(2, dim=-1)
        return self.matmul(F.softmax(self.matmul(q, k.transpose(-2, -1)), -1), k)


class FusedAttention(nn.Module):
    """Attention of two heads; an operand of each place wants a gradient or not."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.attend = nn.Linear(12, 24), gb.nn.ScaledDotProductAttention(causal=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = (part.view(*part.shape[:2], 2, 6).transpose(1, 2) for part in self.qk(x).chunk(2, dim=-1))
        return self.attend(q, k, k.detach()).transpose(1, 2).reshape(x.shape)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 3, bias=False))


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, stride=2, groups=4, padding_mode="circular", padding=1), nn.ReLU(), nn.Flatten()),
        nn.Linear(128, 3),
    )


NETS = {
    "mlp": (mlp, (5, 12)),
    "tokens": (mlp, (2, 7, 12)),
    "cnn": (cnn, (4, 3, 8, 8)),
    "attention": (Attention, (2, 6, 12)),
    "fused attention": (FusedAttention, (2, 6, 12)),
}


def step(net: nn.Module, owner: nn.Module, x: torch.Tensor, seed: int, cast: bool = False) -> list[torch.Tensor]:
    owner.zero_grad()
    torch.manual_seed(seed)
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        y = net(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in owner.parameters()), *(b.clone() for b in owner.buffers())]


def check(net: nn.Module, x: torch.Tensor, backend: str, cast: bool = False) -> None:
    twin = copy.deepcopy(net)
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    for seed in range(3):
        got, want = step(compiled, net, x, seed, cast), step(twin, twin, x, seed, cast)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)
    gc.collect()


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("recipe", ["int8_dynamic", "unified_int8", "statquant_psq"])
def test_one_graph(name, recipe):
    torch.manual_seed(0)
    build, shape = NETS[name]
    net = build()
    gb.quantize_(net, gb.recipe(recipe).with_overrides({"keep_float": ()}))
    check(net, torch.randn(shape), "aot_eager")


@pytest.mark.parametrize("cast", [False, True])
def test_inductor_with_channels_last(cast, inductor):
    torch.manual_seed(0)
    net = cnn().to(memory_format=torch.channels_last)
    gb.quantize_(net, gb.recipe("int8_dynamic").with_overrides({"keep_float": ()}))
    x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    if not cast:
        return check(net, x, inductor)
    # inductor keeps float32 where eager rounds to bfloat16
    compiled = torch.compile(net, fullgraph=True, backend=inductor)
    for seed in range(2):
        assert all(bool(t.isfinite().all()) for t in step(compiled, net, x, seed, cast=True))


def test_ranges_that_remember_are_updated():
    net = mlp()
    gb.quantize_(net, gb.recipe("unified_int8", activation_range="ema").with_overrides({"keep_float": ()}))
    check(net, torch.randn(5, 12), "aot_eager")
    assert any(bool(b.isfinite().all()) for b in net[0].quantizers.buffers())


@pytest.mark.parametrize("name", ["attention", "fused attention"])
def test_no_float_of_an_activation_is_kept_for_the_backward_pass(name):
    torch.manual_seed(0)
    build, shape = NETS[name]
    net = build()
    gb.quantize_(net, "int8_dynamic")
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    gc.collect()
    module._KEPT.clear()
    y = compiled(torch.randn(shape).requires_grad_())
    parameters = {p.data_ptr() for p in net.parameters()}
    leaves = [t for _, kept in module._KEPT.values() for t in kept if t.data_ptr() not in parameters]
    assert leaves
    assert all(t.untyped_storage().nbytes() <= t.element_size() for t in leaves)
    y.sum().backward()


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0)])
def test_attention_to_nothing(lengths):
    net = gb.nn.ScaledDotProductAttention()
    gb.quantize_(net, "int8_dynamic")
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    given_ = [torch.ones(2, 3, n, 4).requires_grad_() for n in (lengths[0], lengths[1], lengths[1])]
    got, want = compiled(*given_), net(*given_)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert [g.shape for g in torch.autograd.grad(got.sum(), given_)] == [x.shape for x in given_]


def test_evaluation_keeps_nothing():
    net = mlp().eval()
    gb.quantize_(net, gb.recipe("int8_dynamic"))
    twin, x = copy.deepcopy(net), torch.randn(5, 12)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    gc.collect()
    before = len(module._KEPT)
    with torch.no_grad():
        assert torch.equal(compiled(x), twin(x))
    assert len(module._KEPT) == before


def test_what_is_kept_goes_with_the_graph():
    """After a backward pass, and also where there is none."""
    net = mlp()
    gb.quantize_(net, gb.recipe("int8_dynamic"))
    compiled, x = torch.compile(net, backend="aot_eager", fullgraph=True), torch.randn(5, 12)
    gc.collect()
    before = len(module._KEPT)
    for backward in (True, False):
        loss = compiled(x).sum()
        assert len(module._KEPT) > before
        if backward:
            loss.backward()
        del loss
        gc.collect()
        assert len(module._KEPT) == before


def test_copies_have_their_own_numbers():
    net = mlp()
    gb.quantize_(net, gb.recipe("int8_dynamic"))
    twin = copy.deepcopy(net)
    numbers = [m.assignment.number for n in (net, twin) for m in n if isinstance(m, gb.nn.quantized.Quantized)]
    assert len(set(numbers)) == 4
    assert all(module._LAYERS[n].assignment.number == n for n in numbers)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch looks at graph inputs' own
@pytest.mark.parametrize("recipe", ["lsq", "qat_int8"])
def test_layers_with_more_to_them_break_the_graph(recipe):
    net = mlp()
    gb.quantize_(net, gb.recipe(recipe).with_overrides({"keep_float": ()}))
    twin, x = copy.deepcopy(net), torch.randn(5, 12)
    compiled = torch.compile(net, backend="aot_eager")
    for seed in range(2):
        for a, b in zip(step(compiled, net, x, seed), step(twin, twin, x, seed), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_residual_network_trains():
    torch.manual_seed(0)
    net = build_model("resnet20", {"in_channels": 3, "classes": 10}, {"width": 4}).to(memory_format=torch.channels_last)
    gb.quantize_(net, gb.recipe("int8_dynamic"))
    x = torch.randn(4, 3, 16, 16).to(memory_format=torch.channels_last)
    check(net, x, "aot_eager")
