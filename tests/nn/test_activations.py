"""Activations kept in few bits: what is packed, what is left, and that gradients stay what they should be."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

import gradbits as gb
from gradbits.core.errors import ArgumentError, DtypeError
from gradbits.observe import saved_bytes


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


def test_a_relu_outside_gives_its_output_whole_to_what_saves_it_inside() -> None:
    layer = nn.Linear(64, 8, bias=False)
    x = F.relu(torch.randn(64, 64, requires_grad=True))
    (exact,) = torch.autograd.grad(layer(x).sum(), layer.weight)
    with gb.pack_activations(bits=8):
        y = layer(x)
    (got,) = torch.autograd.grad(y.sum(), layer.weight)
    assert (got - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("recipe", [None, "int8_dynamic", "statquant_ptq"])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_relu_and_the_layer_behind_it_share_what_is_kept(bits: int, recipe: str | None) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 8, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    if recipe is not None:
        gb.quantize_(layer, gb.recipe(recipe).with_overrides({"keep_float": ()}))
    x = torch.randn(4, 8, 8, 8).contiguous(memory_format=torch.channels_last)
    x[x.abs() < 0.3] *= 1e-4  # positive values that round to 0
    x.requires_grad_()
    grads = []
    for context in (contextlib.nullcontext(), gb.pack_activations(bits=bits)):
        torch.manual_seed(1)
        with context:
            y = F.relu(x * 1.0)
            z = layer(y)
        grads.append(torch.autograd.grad(y.sum() + z.sum() * 0, x, retain_graph=True)[0])
        weight = torch.autograd.grad(z.square().sum(), layer.weight)[0]
        grads.append(weight)
    assert torch.equal(grads[0], grads[2])
    assert (grads[3] - grads[1]).norm() <= {8: 0.02, 4: 0.2, 2: 1.0}[bits] * grads[1].norm()
    apart = x.numel() // 8 if recipe == "statquant_ptq" else 0  # its codes have a zero point
    assert context.tally.after <= (bits / 8 + 0.03) * x.numel() + apart + layer.weight.numel() + 64


def test_log_softmax_keeps_probabilities_and_stays_unbiased() -> None:
    """A z-test over 300 draws; false alarms once in 10^6 over all directions."""
    torch.manual_seed(0)
    x = (torch.randn(32, 64) * 3).requires_grad_()
    target = torch.arange(32)
    (exact,) = torch.autograd.grad(F.cross_entropy(x, target), x)
    draws = []
    for seed in range(300):
        torch.manual_seed(seed)
        with gb.pack_activations(bits=4, min_elements=64) as packed:
            loss = F.cross_entropy(x, target)
        draws.append(torch.autograd.grad(loss, x)[0])
    assert packed.tally.after < 0.32 * packed.tally.before  # once for log-softmax, once for the loss
    directions = torch.randn(x.numel(), 64).double()  # single small probabilities are drawn too rarely for a test
    stack = (torch.stack(draws).double() - exact).flatten(1) @ directions
    z = stack.mean(0) / (stack.std(0) / 300**0.5)
    assert z.abs().max() < stats.norm.isf(1e-6 / (2 * z.numel()))


def test_views_of_one_tensor_share_one_copy() -> None:
    layers = nn.ModuleList(nn.Linear(64, 8, bias=False) for _ in range(3))
    x = torch.randn(16, 4, 64, requires_grad=True) * 1.0
    with gb.pack_activations(bits=8) as packed:
        loss = sum(layer(x).sum() for layer in layers)
    assert packed.tally.before == x.nbytes
    assert packed.tally.after < 0.27 * x.nbytes
    loss.backward()
    assert all(layer.weight.grad is not None for layer in layers)


def test_expanded_tensors_are_left_alone() -> None:
    x, mask = torch.randn(64, 64, requires_grad=True), torch.rand(64, 1)
    with gb.pack_activations(bits=8) as packed:
        y = x * mask.expand(64, 64)
    assert packed.tally.after == packed.tally.before == mask.nbytes
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], mask.expand(64, 64))


@pytest.mark.parametrize("name", ["int8_dynamic", "unified_int8"])
def test_codes_of_quantized_layers(name: str) -> None:
    """With as many bits as the codes have gradients do not change at all; weight codes take no memory."""
    torch.manual_seed(0)
    layer = nn.Linear(128, 64)
    gb.quantize_(layer, gb.recipe(name).with_overrides({"keep_float": ()}))
    x = torch.randn(64, 128, requires_grad=True)
    results, tallies = [], []
    for bits in (None, 8, 4):
        torch.manual_seed(3)
        context = contextlib.nullcontext() if bits is None else gb.pack_activations(bits=bits)
        with context:
            y = layer(x)
        results.append(torch.autograd.grad(y.square().sum(), (x, layer.weight)))
        tallies.append(getattr(context, "tally", None))
    plain, eight, four = results
    assert all(torch.equal(a, b) for a, b in zip(plain, eight, strict=True))
    assert torch.equal(plain[0], four[0])
    assert 0 < (four[1] - plain[1]).norm() < 0.2 * plain[1].norm()
    assert tallies[1].after < x.numel() + 4096 + y.nbytes
    assert tallies[2].after < tallies[1].after - 0.4 * x.numel()


def test_codes_rounded_further_stay_unbiased() -> None:
    """A z-test of the weight gradient over 300 draws; false alarms once in 10^6 over all elements."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 3, bias=False)
    gb.quantize_(layer, "int8_dynamic")
    x, g = torch.randn(32, 64), torch.randn(32, 3)
    exact = x.mul(127 / x.abs().max()).round().mul(x.abs().max() / 127)
    draws = []
    for seed in range(300):
        torch.manual_seed(seed)
        with gb.pack_activations(bits=2, min_elements=64):
            y = layer(x)
        draws.append(torch.autograd.grad(y, layer.weight, g)[0])
    stack = torch.stack(draws).double()
    z = (stack.mean(0) - g.t() @ exact) / (stack.std(0) / 300**0.5)
    assert z.abs().max() < stats.norm.isf(1e-6 / (2 * z.numel()))


def test_a_weight_changed_before_backward_is_refused() -> None:
    layer = nn.Linear(64, 64)
    gb.quantize_(layer, "int8_dynamic")
    x = torch.randn(64, 64, requires_grad=True)
    with gb.pack_activations(bits=8):
        y = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()


def test_quantized_layers_that_share_an_input_share_its_codes() -> None:
    layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
    gb.quantize_(layers, "int8_dynamic")
    x = torch.randn(8, 8, 64, requires_grad=True)
    y = x * 1.0
    assert saved_bytes(layers, lambda: [layer(y) for layer in layers]) < x.numel() + 3 * layers[0].weight.numel() + 512
    first = layers[0](y)
    with torch.no_grad():
        y.mul_(2.0)  # its codes are others now
    assert torch.allclose(layers[0](y) - layers[0].bias, 2 * (first - layers[0].bias), rtol=1e-5)
