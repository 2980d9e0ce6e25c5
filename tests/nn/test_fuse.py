"""What fuse_ finds, how it is undone, and GELU in one pass."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradbits as gb
from gradbits.core.errors import NothingToQuantizeError
from gradbits.kernels.native import library
from gradbits.nn import gelu as module
from gradbits.nn import unfuse_
from gradbits.nn.gelu import FusedGELU
from gradbits.quantizers.known import known_width
from gradbits.train.models import build_model

NATIVE = pytest.mark.skipif(library.why_not() is not None, reason=f"no native kernels: {library.why_not()}")


@pytest.fixture
def however_few(monkeypatch):
    """Fuse small inputs too."""
    monkeypatch.setattr(module, "LEAST", 0)


def fused(approximate: str = "none") -> nn.GELU:
    gelu = nn.GELU(approximate)
    gb.fuse_(gelu)
    return gelu


@NATIVE
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_and_its_gradient(however_few, approximate, dtype):
    x, g = (torch.randn(3, 5, 64).to(dtype) for _ in range(2))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    want, got = F.gelu(a, approximate=approximate), fused(approximate)(b)
    want.backward(g)
    got.backward(g)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(b.grad, a.grad)
    seen = known_width(got)
    assert (seen is None) == (dtype == torch.bfloat16 and approximate == "none")  # which stays with PyTorch
    assert seen is None or seen.item() == got.detach().abs().max().item()


@NATIVE
def test_gradients_in_another_order_or_dtype(however_few):
    x = torch.randn(6, 8).requires_grad_()
    g = torch.randn(8, 6).t()
    (want,) = torch.autograd.grad(F.gelu(x), x, g)
    (got,) = torch.autograd.grad(fused()(x), x, g)
    torch.testing.assert_close(got, want)
    (got,) = torch.autograd.grad(fused()(x.t()).t(), x, g)
    torch.testing.assert_close(got, want)


@NATIVE
def test_layers_around_gelu_get_the_same_numbers(however_few):
    """The scales that the noted widths give are those of looking again: bits do not change."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32), nn.Linear(32, 4))
    gb.quantize_(model, "int8_dynamic")
    gb.fuse_(model)
    x, results = torch.randn(4, 6, 32), []
    for forget in (False, True):
        if forget:
            model[2].register_forward_hook(lambda m, args, y: y + 0.0)  # another tensor, with nothing noted
        torch.manual_seed(1)
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_small_odd_and_compiled_inputs_are_pytorchs():
    gelu, x = fused(), torch.randn(4, 4)
    assert torch.equal(gelu(x), F.gelu(x))
    assert torch.equal(gelu(x.double()), F.gelu(x.double()))
    assert torch.equal(gelu(x[:, ::2]), F.gelu(x[:, ::2]))
    assert gelu(torch.empty(0)).shape == (0,)


@NATIVE
def test_inference_mode_and_transforms(however_few):
    gelu, x = fused(), torch.randn(8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(gelu(x.clone()), F.gelu(x))
    torch.testing.assert_close(torch.func.vmap(gelu)(x), F.gelu(x))


def test_inference_mode_of_a_quantized_model(however_few):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.Linear(8, 2))
    gb.quantize_(model, "int8_dynamic")
    gb.fuse_(model)
    model.eval()
    x = torch.randn(5, 8)
    with torch.no_grad():
        want = model(x)
    with torch.inference_mode():
        assert torch.equal(model(x), want)


def test_fuse_names_what_it_found_and_is_undone():
    model = build_model("gpt", {"vocabulary": 16}, {"context": 8, "d_model": 16, "layers": 2, "heads": 2})
    assert gb.fuse_(model) == ("blocks.0.gelu", "blocks.1.gelu")
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert type(again.blocks[0].gelu) is FusedGELU
    unfuse_(again)
    assert type(again.blocks[0].gelu) is nn.GELU
    with pytest.raises(NothingToQuantizeError, match="neither batch norm nor GELU"):
        gb.fuse_(nn.Linear(2, 2))


@NATIVE
def test_the_report_says_what_was_fused(however_few):
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU())
    gb.fuse_(model)
    assert gb.report(model).fused == ()
    model(torch.randn(2, 4))
    assert gb.report(model).fused == ("1",)
    assert "computed in one pass: 1" in str(gb.report(model))


def relu_net() -> nn.Sequential:
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(inplace=True), nn.Flatten())
    return nn.Sequential(*conv, nn.Linear(16 * 16, 32), nn.ReLU(), nn.Linear(32, 4))


@pytest.mark.parametrize("recipe", ["int8_dynamic", "statquant_bhq", "int4_transformer", "lsq"])
def test_a_relu_behind_a_quantized_layer_is_its_own_in_inference(recipe):
    """Equal bits with and without, in training mode too; rotated, digit-split and zero-pointed products included."""
    plain = relu_net()
    gb.quantize_(plain, gb.recipe(recipe).with_overrides({"keep_float": ()}))
    x = torch.randn(4, 3, 8, 8)
    plain(x)  # settles what a first batch settles
    joined = copy.deepcopy(plain)
    gb.fuse_(joined)
    for mode in (False, True):
        for model in (plain, joined):
            model.train(mode)
        torch.manual_seed(1)
        with torch.no_grad():
            want = plain(x)
        torch.manual_seed(1)
        with torch.no_grad():
            assert torch.equal(joined(x), want)
    torch.manual_seed(2)
    plain(x).square().sum().backward()
    torch.manual_seed(2)
    joined(x).square().sum().backward()
    for a, b in zip(plain.parameters(), joined.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_the_kernel_applies_it_and_nothing_twice(monkeypatch):
    model = relu_net()
    gb.quantize_(model, "int8_dynamic")
    assert gb.fuse_(model) == ()
    calls = []
    original = F.relu
    monkeypatch.setattr(F, "relu", lambda *a, **k: calls.append(1) or original(*a, **k))
    x = torch.randn(4, 3, 8, 8)
    with torch.inference_mode():
        want = model(x)
    assert calls == []
    seen = []
    hook = model[2].register_forward_hook(lambda m, args, y: seen.append(float(y.min())))
    with torch.no_grad():
        assert torch.equal(model(x), want)
    hook.remove()
    assert seen[0] < 0.0  # a hook sees what the layer itself gives
    assert len(calls) == 1
    gb.dequantize_(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), want, rtol=0.1, atol=0.1)
    unfuse_(model)
    assert type(model[1]) is nn.ReLU


class Twice(nn.Module):
    """One ReLU behind a batch norm here and behind a convolution there."""

    def __init__(self):
        super().__init__()
        act = nn.ReLU()
        self.a = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), act)
        self.b = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), act)

    def forward(self, x):
        return self.b(self.a(x))


@pytest.mark.parametrize("recipe", [None, "int8_dynamic"])
def test_modules_in_several_places_stay_what_they_are(recipe):
    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(2, 3, 8, 8)
    layer = nn.Linear(8, 8)
    tied = nn.Sequential(nn.Sequential(layer, nn.ReLU()), nn.Sequential(layer, nn.Tanh())).eval()
    if recipe is not None:
        gb.quantize_(model, gb.recipe(recipe).with_overrides({"keep_float": ()}))
        gb.quantize_(tied, gb.recipe(recipe).with_overrides({"keep_float": ()}))
        gb.fuse_(tied)
    with torch.no_grad():
        want, linear = model(x), unfused(tied)(x[..., 0, :])
        gb.fuse_(model)
        assert torch.equal(model(x), want)
        assert torch.equal(tied(x[..., 0, :]), linear)


def unfused(model: nn.Module) -> nn.Module:
    """Return a copy that nothing was fused in."""
    model = copy.deepcopy(model)
    unfuse_(model)
    return model


def test_what_is_called_without_its_relu_gives_no_relu():
    """Alone, in a slice, behind a hook; a norm as well as a layer."""
    model = relu_net().eval()
    gb.quantize_(model, gb.recipe("int8_dynamic").with_overrides({"keep_float": ()}))
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        want = [m(x) for m in (model[0], net[:2])]
        gb.fuse_(model), gb.fuse_(net)
        for got, w in zip((model[0](x), net[:2](x)), want, strict=True):
            assert torch.equal(got, w)
            assert w.min() < 0.0
        assert torch.equal(model[:1](x), want[0])
        seen = []
        net[1].register_forward_hook(lambda m, args, y: seen.append(y.clone()))
        assert torch.equal(net(x), F.relu(want[1]))
        assert torch.equal(seen[0], want[1])
        net[2].register_forward_hook(lambda m, args, y: y * 0.0)
        assert not net(x).any()


def test_learned_steps_keep_the_derivative_of_the_relu():
    """Also where weight and bias have no gradients."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    gb.quantize_(plain, gb.recipe("lsq").with_overrides({"keep_float": ()}))
    x = torch.randn(32, 16)
    plain(x)
    for p in (plain[0].weight, plain[0].bias):
        p.requires_grad_(False)
    fused_ = copy.deepcopy(plain)
    gb.fuse_(fused_)
    for model in (plain, fused_):
        model(x).square().sum().backward()
    for a, b in zip(plain.parameters(), fused_.parameters(), strict=True):
        assert a.grad is b.grad is None or torch.equal(a.grad, b.grad)


@NATIVE
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_transforms_and_tracers_get_pytorchs_own(monkeypatch):
    monkeypatch.setattr("gradbits.nn.norm.LEAST", 0)
    net = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()).to(memory_format=torch.channels_last).eval()
    gb.fuse_(net)
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    weights = {name: p.detach() for name, p in net.named_parameters()}
    grads = torch.func.grad(lambda p: torch.func.functional_call(net, p, (x,)).sum())(weights)
    assert set(grads) == {"0.weight", "0.bias"}
    assert torch.equal(torch.jit.trace(net, x)(x), unfused(net)(x))
