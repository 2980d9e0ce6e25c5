"""Activations kept in few bits: what is packed, what is left, and that gradients stay what they should be."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

import gradbits as gb
from gradbits.core.errors import ArgumentError, DtypeError


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(16 * 16, 10),
    )


def gradient(net: nn.Module, x: torch.Tensor, bits: int | None, seed: int = 0) -> torch.Tensor:
    net.zero_grad()
    torch.manual_seed(seed)
    target = torch.arange(len(x)) % 10
    if bits is None:
        loss = F.cross_entropy(net(x), target)
    else:
        with gb.pack_activations(bits=bits, min_elements=64):
            loss = F.cross_entropy(net(x), target)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.03), (4, 0.3), (2, 1.0)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_close(bits: int, bound: float, memory_format: torch.memory_format) -> None:
    net = network().to(memory_format=memory_format)
    x = torch.randn(16, 3, 8, 8).contiguous(memory_format=memory_format)
    exact = gradient(net, x, None)
    got = gradient(net, x, bits)
    assert 0 < (got - exact).norm() / exact.norm() < bound


@pytest.mark.parametrize(("bits", "ratio"), [(8, 0.27), (4, 0.145), (2, 0.085)])
def test_bytes(bits: int, ratio: float) -> None:
    layer = nn.Linear(256, 256)
    x = torch.randn(512, 256, requires_grad=True) * 1.0
    with gb.pack_activations(bits=bits) as packed:
        layer(x)
    assert packed.tally.before == 512 * 256 * 4
    assert packed.tally.after <= ratio * packed.tally.before


def test_linear_operations_stay_unbiased() -> None:
    """A z-test of the mean gradient of a Linear over 400 draws; false alarms once in 10^6 over all elements."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 3, bias=False)
    x = torch.randn(32, 64)
    g = torch.randn(32, 3)
    exact = g.t() @ x
    draws = []
    for seed in range(400):
        torch.manual_seed(seed)
        with gb.pack_activations(bits=2, min_elements=64):
            y = layer(x)
        draws.append(torch.autograd.grad(y, layer.weight, g)[0])
    stack = torch.stack(draws).double()
    z = (stack.mean(0) - exact) / (stack.std(0) / 400**0.5)
    assert z.abs().max() < stats.norm.isf(1e-6 / (2 * z.numel()))
    assert (draws[0] - exact).abs().max() > 0.01


def test_relu_is_exact_in_one_bit() -> None:
    x = torch.randn(4096, requires_grad=True)
    with gb.pack_activations(bits=2) as packed:
        y = F.relu(x * 1.0)
    y.sum().backward()
    assert torch.equal(x.grad, (x > 0).float())
    assert packed.tally.after == 4096 // 8


def test_one_copy_where_two_layers_save_the_same_tensor() -> None:
    a, b = nn.Linear(64, 8, bias=False), nn.Linear(64, 8, bias=False)
    x = torch.randn(64, 64, requires_grad=True) * 1.0
    with gb.pack_activations(bits=8) as once:
        a(x)
    with gb.pack_activations(bits=8) as twice:
        a(x) + b(x)
    assert twice.tally == once.tally


def test_changed_in_place_is_another_tensor() -> None:
    a, b = nn.Linear(64, 8, bias=False), nn.Linear(64, 8, bias=False)
    x = torch.randn(64, 64, requires_grad=True) * 1.0
    with gb.pack_activations(bits=8):
        first = a(x.clone()).sum()
        x.mul_(3.0)
        second = b(x).sum()
    (first + second).backward()
    assert a.weight.grad is not None
    assert (b.weight.grad - 3 * a.weight.grad).norm() < 0.05 * b.weight.grad.norm()


def test_masks_and_indices_are_exact() -> None:
    x = torch.randn(2, 4, 32, 32, requires_grad=True)
    plain = F.max_pool2d(x * 1.0, 2)
    (want,) = torch.autograd.grad(plain.sum(), x)
    with gb.pack_activations(bits=8, min_elements=16):
        y = F.max_pool2d(x * 1.0, 2)
    (got,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(got, want)
    mask = torch.rand(64, 64) > 0.5
    with gb.pack_activations(bits=8):
        z = torch.where(mask, x.flatten()[:4096].view(64, 64), torch.zeros(()))
    (grad,) = torch.autograd.grad(z.sum(), x)
    assert torch.equal(grad.flatten()[:4096].view(64, 64) > 0, mask)


def test_parameters_and_small_tensors_are_left_alone() -> None:
    layer = nn.Linear(64, 64)
    x = torch.randn(4, 64, requires_grad=True)
    exact = torch.autograd.grad(layer(x).square().sum(), (x, layer.weight))
    with gb.pack_activations(bits=2) as packed:
        loss = layer(x).square().sum()
    got = torch.autograd.grad(loss, (x, layer.weight))
    assert all(torch.equal(a, b) for a, b in zip(exact, got, strict=True))
    assert packed.tally.before == packed.tally.after


def test_quantized_layers_keep_their_codes() -> None:
    net = network()
    gb.quantize_(net, "int8_dynamic")
    x = torch.randn(16, 3, 8, 8)
    with gb.pack_activations(bits=4, min_elements=64) as packed:
        loss = net(x).square().sum()
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    assert packed.tally.after < 0.5 * packed.tally.before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_come_back(dtype: torch.dtype) -> None:
    x = torch.randn(64, 64, dtype=dtype, requires_grad=True)
    with gb.pack_activations(bits=8):
        y = (x * 1).square().sum()
    y.backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert torch.allclose(x.grad, 2 * x, rtol=0.1, atol=0.1)


def test_nothing_is_kept_after_the_graph_is_gone() -> None:
    net, x = network(), torch.randn(16, 3, 8, 8)
    context = gb.pack_activations(bits=8, min_elements=64)

    def packed_objects() -> int:
        gc.collect()
        return sum(type(o).__name__.startswith("Packed") for o in gc.get_objects())

    before = packed_objects()
    for _ in range(3):
        with context:
            loss = net(x).sum()
        loss.backward()
    with context:
        unused = net(x).sum()
    assert packed_objects() > before
    del loss, unused
    assert packed_objects() == before


def test_illegal_arguments() -> None:
    with pytest.raises(ArgumentError, match="bits=9"):
        gb.pack_activations(bits=9)
    with pytest.raises(ArgumentError, match="group=2"):
        gb.pack_activations(group=2)
    with pytest.raises(DtypeError, match="min_elements"):
        gb.pack_activations(min_elements=1.5)  # type: ignore[arg-type]
