"""Batch norm with what follows it: the fused pass computes what PyTorch computes step by step."""

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
from gradbits.nn import norm_relu, unfuse_
from gradbits.nn.norm import NormReLU, why_not_fused
from gradbits.quantizers.known import known_width
from gradbits.train.models import build_model

NATIVE = pytest.mark.skipif(library.why_not() is not None, reason=f"no native kernels: {library.why_not()}")


@pytest.fixture(autouse=True)
def however_few(monkeypatch):
    """Fuse small images too."""
    monkeypatch.setattr("gradbits.nn.norm.LEAST", 0)


def images(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3 + 1
    return x.to(dtype).movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_()


def norms(channels: int, **options) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(channels, **options)
    if plain.affine:
        nn.init.normal_(plain.weight)
        nn.init.normal_(plain.bias)
    fused = copy.deepcopy(plain)
    gb.fuse_(fused)
    return plain, fused


def results(norm: nn.Module, x: torch.Tensor, r: torch.Tensor | None, g: torch.Tensor) -> list[torch.Tensor]:
    y = norm_relu(norm, x, r)
    wanted = [t for t in (x, r, *norm.parameters()) if t is not None]
    return [y.detach(), *torch.autograd.grad(y, wanted, g), *(b.float() for b in norm.buffers())]


def close(a: list[torch.Tensor], b: list[torch.Tensor], bound: float) -> bool:
    return len(a) == len(b) and all(
        float((x.double() - y.double()).norm()) <= bound * (1e-6 + float(y.double().norm()))
        for x, y in zip(a, b, strict=True)
    )


@NATIVE
@pytest.mark.parametrize("shape", [(4, 16, 5, 7), (3, 24, 8, 8), (2, 64, 3, 3), (2, 200, 4, 4), (70, 3, 33, 31)])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_equals_the_steps_one_by_one(shape, residual, training):
    plain, fused = norms(shape[1])
    x, r, g = images(*shape), images(*shape, seed=1) if residual else None, images(*shape, seed=2).detach()
    for module in (plain, fused):
        module.train(training)
        module.running_mean.fill_(0.5)
    assert why_not_fused(fused, x, r) is None
    for _ in range(2):
        a, b = results(plain, x, r, g), results(fused, x, r, g)
        # a value that rounds to another side of zero would be an error of its gradient; none is that close here
        assert close(b, a, 1e-5)


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_beyond_the_caches(dtype):
    """Large ones take another way to memory; a few of them round to the other side of zero."""
    plain, fused = norms(64)
    x, r, g = (images(33, 64, 32, 32, dtype=dtype, seed=s) for s in range(3))
    exact = results(plain, *(t.detach().float().requires_grad_() for t in (x, r)), g.detach().float())
    assert close(results(fused, x, r, g.detach()), exact, 2e-3 if dtype == torch.float32 else 0.02)


@NATIVE
@pytest.mark.parametrize(
    "options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"eps": 0.5, "momentum": 0.3}]
)
def test_options_of_batch_norm(options):
    plain, fused = norms(8, **options)
    x, g = images(4, 8, 6, 6), images(4, 8, 6, 6, seed=2).detach()
    for _ in range(3):
        assert close(results(fused, x, None, g), results(plain, x, None, g), 1e-5)


@NATIVE
def test_bfloat16_differs_only_by_its_rounding():
    plain, fused = norms(16)
    x, r, g = (images(8, 16, 9, 9, dtype=torch.bfloat16, seed=s) for s in range(3))
    exact = results(plain, *(t.detach().float().requires_grad_() for t in (x, r)), g.detach().float())
    y = norm_relu(fused, x, r)
    assert y.dtype == torch.bfloat16
    assert close([y.detach()], exact[:1], 0.005)
    assert close(results(fused, x, r, g.detach())[1:5], exact[1:5], 0.01)


@NATIVE
def test_a_large_mean_does_not_cancel():
    plain, fused = norms(4)
    x = (images(8, 4, 16, 16).detach() * 0.01 + 1000.0).requires_grad_()
    want = F.batch_norm(x.detach().double(), None, None, plain.weight.double(), plain.bias.double(), True).relu()
    assert (norm_relu(fused, x).double() - want).norm() < 0.02 * want.norm()


@NATIVE
def test_inference_mode():
    plain, fused = norms(8)
    with torch.inference_mode():
        x = images(4, 8, 5, 5).detach()
        torch.testing.assert_close(norm_relu(fused.eval(), x), norm_relu(plain.eval(), x))


@NATIVE
def test_threads_change_nothing():
    _, fused = norms(16)
    x, g = images(16, 16, 32, 32), images(16, 16, 32, 32, seed=2).detach()
    threads = torch.get_num_threads()
    found = []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(results(copy.deepcopy(fused), x, None, g))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("x", "r"),
    [
        (torch.randn(4, 8, 6, 6), None),
        (images(4, 8, 6, 6).detach().double(), None),
        (images(4, 8, 6, 6).detach(), torch.randn(4, 8, 1, 1)),
        (images(4, 8, 6, 6).detach(), torch.randn(4, 8, 6, 6)),
    ],
)
def test_what_cannot_be_fused_is_computed_as_written(x, r):
    plain, fused = norms(8)
    plain, fused = plain.to(x.dtype), fused.to(x.dtype)
    assert why_not_fused(fused, x, r)
    want = plain(x)
    assert torch.equal(norm_relu(fused, x, r), F.relu(want if r is None else want + r))


@NATIVE
def test_few_elements_are_left_to_pytorch(monkeypatch):
    monkeypatch.setattr("gradbits.nn.norm.LEAST", 1 << 20)
    _, fused = norms(8)
    assert "too few" in why_not_fused(fused, images(4, 8, 6, 6))
    norm_relu(fused, images(4, 8, 6, 6))
    assert not gb.report(fused).fused


def test_nothing_is_fused_unless_asked_for(monkeypatch):
    def fail(*args):
        raise AssertionError

    monkeypatch.setattr(NormReLU, "apply", fail)
    plain, _ = norms(8)
    x = images(4, 8, 6, 6)
    twin = copy.deepcopy(plain)
    assert torch.equal(norm_relu(plain, x), F.relu(twin(x)))
    assert norm_relu(nn.Identity(), x).min() == 0


def test_bad_input_is_refused_as_pytorch_refuses_it():
    for norm in norms(8):
        with pytest.raises((ValueError, RuntimeError)):
            norm_relu(norm, images(4, 6, 6, 6))
        with pytest.raises(ValueError, match="4D"):
            norm_relu(norm, torch.randn(4, 8))
    with pytest.raises(NothingToQuantizeError, match="neither batch norm nor GELU"):
        gb.fuse_(nn.Linear(2, 2))


@NATIVE
def test_sequences_keep_names_parameters_and_results():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    net = net.to(memory_format=torch.channels_last)
    x = images(4, 3, 9, 9).detach()
    before = copy.deepcopy(net)
    assert gb.fuse_(net) == ("1", "4")
    assert list(net.state_dict()) == list(before.state_dict())
    y, want = net(x), before(x)
    assert torch.allclose(y, want, rtol=1e-4, atol=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(net.buffers(), before.buffers(), strict=True))
    assert gb.report(net).fused == ("1",)
    assert "computed in one pass: 1" in str(gb.report(net))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    assert gb.report(twin).fused == ("1",)
    unfuse_(net)
    assert [type(m) for m in net] == [type(m) for m in before]
    assert not gb.report(net).fused


@NATIVE
@pytest.mark.parametrize("name", ["resnet18", "resnet20"])
def test_residual_networks(name):
    torch.manual_seed(0)
    net = build_model(name, {"in_channels": 3, "classes": 10}, {"width": 4}).to(memory_format=torch.channels_last)
    fused = copy.deepcopy(net)
    gb.fuse_(fused)
    x = images(4, 3, 16, 16).detach()
    grads = []
    for model in (net, fused):
        F.cross_entropy(model(x), torch.arange(4)).backward()
        grads.append([p.grad for p in model.parameters()])
    assert close(*grads, 1e-3)
    convolutions = sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    shortcuts = sum("shortcut" in n and isinstance(m, nn.BatchNorm2d) for n, m in net.named_modules())
    assert len(gb.report(fused).fused) == convolutions - shortcuts


@NATIVE
@pytest.mark.parametrize("bits", [8, 4])
def test_packed_activations(bits):
    _, fused = norms(16)
    x, g = images(8, 16, 16, 16), images(8, 16, 16, 16, seed=2).detach()
    exact = results(fused, x, None, g)
    with gb.pack_activations(bits=bits) as packed:
        y = norm_relu(fused, x * 1.0)
    got = torch.autograd.grad(y, x, g)[0]
    assert (got - exact[1]).norm() < {8: 0.02, 4: 0.3}[bits] * exact[1].norm()
    assert packed.tally.after < (bits / 8 + 0.17) * x.numel()  # the values, and a bit for each mask


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
def test_the_largest_magnitude_is_that_of_the_result(dtype, bad):
    _, fused = norms(24)
    x, g = images(6, 24, 7, 5, dtype=dtype), images(6, 24, 7, 5, dtype=dtype, seed=2).detach()
    if bad is not None:
        with torch.no_grad():
            x[3, 5, 2, 2] = bad
    y = norm_relu(fused, x)
    grads = []
    x.register_hook(grads.append)
    y.backward(g)
    for t in (y, grads[0]):
        width, found = t.detach().abs().max().float(), known_width(t)
        assert found is not None
        assert torch.equal(found, width) or bool(found.isnan() & width.isnan())
