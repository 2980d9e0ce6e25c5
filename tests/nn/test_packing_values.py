"""Activations kept in few bits where values are not ordinary: not finite, beyond float32, statistics, slices."""

from __future__ import annotations

import gc
from collections.abc import Callable
from weakref import ref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradbits as gb
from gradbits.kernels.native import library
from gradbits.nn.norm import NormReLU
from gradbits.nn.statistics import Statistics


def gradients(
    compute: Callable[[], torch.Tensor], inputs: list[torch.Tensor], bits: int | None
) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    if bits is None:
        y = compute()
    else:
        with gb.pack_activations(bits=bits):
            y = compute()
    torch.manual_seed(1)
    return torch.autograd.grad(y, inputs, torch.randn_like(y))


def error(compute: Callable[[], torch.Tensor], inputs: list[torch.Tensor], bits: int) -> float:
    """Largest relative error of the gradients that packing to ``bits`` causes."""
    exact, packed = gradients(compute, inputs, None), gradients(compute, inputs, bits)
    return max(float((b - a).norm() / a.norm()) for a, b in zip(exact, packed, strict=True))


def log_softmax(x: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(x.view(64, 64), 1)


def square(x: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: torch.square(x * 1)


def causal(size: int = 64) -> torch.Tensor:
    return nn.Transformer.generate_square_subsequent_mask(size)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_causal_mask_of_minus_infinity(bits: int) -> None:
    torch.manual_seed(0)
    net, x = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0), torch.randn(4, 64, 64)
    parameters = [net.self_attn.in_proj_weight, net.linear1.weight]
    assert error(lambda: net(x, src_mask=causal()), parameters, bits) < {8: 0.03, 4: 0.5}[bits]


def test_attention_and_logsumexp_with_minus_infinity() -> None:
    q = torch.randn(4, 4, 64, 64, requires_grad=True)
    attention = lambda: F.scaled_dot_product_attention(q * 1, q * 1, q * 1, attn_mask=causal())  # noqa: E731
    assert error(attention, [q], 8) < 0.03
    x = torch.randn(4, 64, 64, requires_grad=True)
    assert error(lambda: torch.logsumexp(x * 1 + causal(), -1), [x], 8) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("f", [torch.square, torch.relu, torch.tanh, F.gelu, log_softmax])
def test_gradients_of_what_is_not_finite(
    f: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype, bad: float
) -> None:
    x = torch.randn(4096, dtype=dtype)
    x[1234] = bad
    x.requires_grad_()
    (exact,), (packed,) = (gradients(lambda: f(x * 1), [x], bits) for bits in (None, 8))
    assert torch.equal(exact.isnan(), packed.isnan())
    assert torch.allclose(exact, packed, rtol=0.1, atol=0.1, equal_nan=True)
    if f in (torch.square, torch.relu):
        assert torch.equal(exact.nan_to_num(), packed.nan_to_num())


def test_a_relu_that_shares_its_output_passes_nan_on() -> None:
    layer, x = nn.Linear(64, 64), torch.randn(64, 64)
    x[3, 4] = float("nan")
    x.requires_grad_()
    for bits in (None, 8, 4):
        with gb.pack_activations(bits=bits or 8):
            y = F.relu(x * 1)
            layer(y)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], (~(x <= 0)).float())


def test_float64_beyond_float32_stays() -> None:
    for scale in (1e60, 1e-60, 3.4e38, 1e-38):
        x = (scale * (1 + torch.rand(4096, dtype=torch.float64))).requires_grad_()
        assert error(square(x), [x], 8) == 0, scale
    x = (1e-20 * (1 + torch.rand(4096, dtype=torch.float64))).requires_grad_()
    assert 0 < error(square(x), [x], 8) < 0.01


@pytest.mark.parametrize(("dtype", "top"), [(torch.float16, 65504.0), (torch.float32, 3.4e38)])
def test_the_grid_does_not_leave_the_dtype(dtype: torch.dtype, top: float) -> None:
    x, factor = torch.linspace(-0.1 * top, top, 4096).to(dtype), torch.ones(4096, dtype=dtype, requires_grad=True)
    with gb.pack_activations(bits=4):
        y = x * factor
    assert torch.equal(torch.autograd.grad(y, factor, torch.ones_like(y))[0].isinf(), x.isinf())
    high = torch.full((4096,), 0.95 * top).mul(1 - 0.1 * torch.rand(4096)).to(dtype).requires_grad_()
    with gb.pack_activations(bits=8) as packed:
        (high * 1).square()
    assert packed.tally.after < 0.6 * packed.tally.before  # near the end, but on a grid


def test_a_tensor_that_is_kept_as_it_is_counts_once() -> None:
    x = (torch.randn(64, 64) + causal()).requires_grad_()
    with gb.pack_activations(bits=4) as packed:
        y = x * 1
        y.square(), y.square(), y.exp()
    assert packed.tally.after <= packed.tally.before
    assert packed.tally.before == 2 * x.nbytes  # the product, and the exponential of it


def test_what_is_kept_as_it_is_must_not_change_in_place() -> None:
    x = torch.full((4096,), float("inf"), requires_grad=True)
    with gb.pack_activations(bits=8):
        y = x * 1
        z = y.square()
    y.zero_()
    with pytest.raises(RuntimeError, match="changed in place"):
        z.sum().backward()


@pytest.mark.parametrize("size", [16, 4096])
def test_an_output_that_is_kept_as_it_is_goes_with_its_graph(size: int) -> None:
    x = torch.full((size,), float("inf"), requires_grad=True)
    with gb.pack_activations(bits=8):
        y = x.exp()
    gone = ref(y)  # a hook that keeps it would keep it with what keeps the hook's answer
    del y
    gc.collect()
    assert gone() is None


# no group of the packed input holds several samples or channels, so what is measured is what becomes of the statistics
NORMS = {
    "layer norm": (nn.LayerNorm(256), (2048, 256)),
    "layer norm of two axes": (nn.LayerNorm([16, 16]), (2048, 16, 16)),
    "group norm": (nn.GroupNorm(32, 128), (64, 128, 8, 8)),
    "group norm of vectors": (nn.GroupNorm(128, 512), (64, 512)),
}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", NORMS)
def test_statistics_of_samples_that_differ_in_size(name: str, bits: int) -> None:
    norm, shape = NORMS[name]
    torch.manual_seed(0)
    x = torch.randn(shape)
    x[-len(x) // 4 :] *= 1e-3
    x[: len(x) // 4] += 100 * torch.randn(len(x) // 4, *[1] * (len(shape) - 1))
    x.requires_grad_()
    assert error(lambda: norm(x * 1), [norm.weight], bits) < {8: 0.05, 4: 0.6}[bits]


def test_rms_norm_of_rows_that_differ_in_size() -> None:
    torch.manual_seed(0)
    norm, x = nn.RMSNorm(256), torch.randn(2048, 256)
    x[::2] *= 1e-3
    x.requires_grad_()
    (exact,), (packed,) = (gradients(lambda: norm(x * 1), [x], bits) for bits in (None, 8))
    loud = exact[1::2]  # the others' are a thousand times as large
    assert (packed[1::2] - loud).norm() < 0.05 * loud.norm()


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.02), (4, 0.2)])
def test_layer_norm_of_padded_rows(bits: int, bound: float) -> None:
    torch.manual_seed(0)
    norm, x = nn.LayerNorm(64), torch.randn(8, 256, 64)
    x[:, 200:] = 0
    assert error(lambda: norm(x), [norm.weight], bits) < bound


@pytest.mark.parametrize("name", ["BatchNorm2d", "InstanceNorm2d"])
def test_channels_that_differ_in_size(name: str) -> None:
    torch.manual_seed(0)
    norm = getattr(nn, name)(1024, affine=True)
    size = torch.logspace(-2, 2, 1024)[torch.randperm(1024)].view(1, -1, 1, 1)
    x = ((torch.randn(2, 1024, 16, 16) + torch.randn(1, 1024, 1, 1)) * size).requires_grad_()
    assert error(lambda: norm(x * 1), [norm.weight], 8) < 0.05


@pytest.mark.skipif(library.why_not() is not None, reason=f"no native kernels: {library.why_not()}")
def test_statistics_of_the_fused_batch_norm() -> None:
    x = torch.randn(4, 384, 8, 8).contiguous(memory_format=torch.channels_last)
    x = (x * 1e-3).requires_grad_()  # so the deviation's inverse is far from the mean, and groups hold both
    weight, bias = torch.ones(384, requires_grad=True), torch.zeros(384, requires_grad=True)
    fused = lambda: NormReLU.apply(x * 1, weight, bias, None, torch.empty(3, 384), 1e-8)  # noqa: E731
    assert error(fused, [weight], 8) < 0.05


def test_what_is_no_statistic_is_packed() -> None:
    statistics = Statistics(least=1024)
    statistics.see(torch.empty(16, 32, 64, 64))
    for shape in ((16, 32, 32, 32), (16, 64, 16, 16), (16, 1000), (512, 32), (16, 8, 64, 64), (16, 32, 64, 32)):
        assert not statistics.has(torch.empty(shape, requires_grad=True)), shape
    assert not statistics.has(torch.empty(16, 32, 64, 1, dtype=torch.int64))
    cast = torch.empty(16, 32, 64, 1, requires_grad=True).bfloat16()  # under autocast, a convolution's 1 x 1 weight
    assert not statistics.has(cast)
    for _ in range(8):
        statistics.see(torch.empty(4096))
    assert not statistics.has(torch.empty(16, 32, 64, 1))  # what it would be of was saved long ago


@pytest.mark.parametrize("start", [1, 4, 7, 8])
@pytest.mark.parametrize("size", [4096, 4099])
def test_masks_that_are_slices(start: int, size: int) -> None:
    mask = (torch.rand(size + start) > 0.5)[start:]
    every_other = (torch.rand(2 * size) > 0.5)[::2]
    x = torch.randn(size, requires_grad=True)
    with gb.pack_activations(bits=4):
        y = (x * 1).masked_fill(mask, 0.0)
        z = (x * 1).masked_fill(every_other, 0.0)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], (~mask).float())
    assert torch.equal(torch.autograd.grad(z.sum(), x)[0], (~every_other).float())


def test_every_other_value() -> None:
    x = torch.randn(64, 128, requires_grad=True)
    with gb.pack_activations(bits=8):
        y = (x * 1)[:, ::2].square()
    assert torch.allclose(torch.autograd.grad(y.sum(), x)[0][:, ::2], 2 * x[:, ::2], atol=0.1)


def test_a_weight_that_changes_before_its_backward_pass_is_refused():
    """As without packing: the gradient of the input needs what it was."""
    layer, x = nn.Linear(64, 64), torch.randn(128, 64, requires_grad=True)
    with gb.pack_activations(bits=8):
        y = layer(x * 1)
    with torch.no_grad():
        layer.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()
