"""The quantize kernel against the definition written out, for all grains, memory orders and dtypes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradbits.core.noise import NoiseKey, noise_bits
from gradbits.kernels import quantize as module
from gradbits.kernels.dispatch import Request, kernel_table
from gradbits.kernels.quantize import CodeMap, memory_order, quantize

KERNELS = [k.run for k in kernel_table()["quantize"] if k.why_not(Request("cpu")) is None]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def slow(x: torch.Tensor, m: CodeMap, v: torch.Tensor | None) -> torch.Tensor:
    """The definition, one rounding to float32 after another."""
    t = x.float()
    if m.shift is not None:
        t = t - m.shift
    t = t * m.inverse
    if v is not None:
        t = t + v
    t = torch.round(t)
    if m.zero is not None:
        t = t + m.zero
    return t.clamp(m.low, m.high).to(torch.int8)


def noise_in_memory_order(x: torch.Tensor, key: NoiseKey) -> torch.Tensor:
    """The noise of each element: element i of the stream belongs to element i in memory order."""
    order = memory_order(x)
    v = (noise_bits(key, 0, x.numel()).double() + 0.5).float() * 2.0**-16
    if order is None:
        return v.view(x.shape)
    inverse = sorted(range(x.dim()), key=lambda i: order[i])
    return v.view(x.permute(order).shape).permute(inverse)


def in_order(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same shape in another memory order."""
    if how == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "channels_last" and x.dim() > 2:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if how == "sliced" and x.dim():
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 3)
        wide[..., 2 : 2 + 2 * x.shape[-1] : 2] = x
        return wide[..., 2 : 2 + 2 * x.shape[-1] : 2]
    if how == "expanded" and x.dim() and x.shape[0]:
        return x[:1].expand(x.shape)
    return x


@st.composite
def problems(draw) -> tuple[torch.Tensor, CodeMap]:
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    x = torch.randn(shape, generator=rng) * 3
    x = in_order(x.to(draw(st.sampled_from(DTYPES))), draw(st.sampled_from(ORDERS)))
    axis = draw(st.integers(-1, len(shape) - 1))
    size = [n if i == axis else 1 for i, n in enumerate(shape)]

    def parameter(values: torch.Tensor) -> torch.Tensor:
        return values if draw(st.booleans()) else values.reshape(-1)[:1].reshape((1,) * len(shape))

    count = torch.Size(size).numel()
    if count == 0:
        count, size = 1, [1] * len(shape)
    inverse = parameter((torch.rand(count, generator=rng) * 40 + 0.5).reshape(size))
    shift = parameter(torch.randn(count, generator=rng).reshape(size)) if draw(st.booleans()) else None
    zeros = torch.randint(-9, 9, (count,), generator=rng).float().reshape(size)
    zero = parameter(zeros) if draw(st.booleans()) else None
    low, high = draw(st.sampled_from([(-127, 127), (-128, 127), (-7, 7), (-2, 1)]))
    return x, CodeMap(inverse, low, high, shift, zero)


ORDERS = ("contiguous", "transposed", "channels_last", "sliced", "expanded")


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=250, deadline=None)
@given(problem=problems(), seed=st.integers(0, 99))
def test_equals_the_definition(kernel, problem, seed):
    x, m = problem
    key = NoiseKey.of(seed, 2)
    got = kernel(x, m)
    assert got.dtype == torch.int8
    assert torch.equal(got, slow(x, m, None))
    assert torch.equal(kernel(x, m, key), slow(x, m, noise_in_memory_order(x, key)))
    v = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) - 0.5
    assert torch.equal(kernel(x, m, v), slow(x, m, v))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("how", ["contiguous", "transposed", "channels_last"])
def test_codes_keep_the_memory_order(kernel, how):
    x = in_order(torch.randn(4, 3, 5, 2), how)
    assert kernel(x, CodeMap(torch.ones(1, 1, 1, 1), -7, 7)).stride() == x.stride()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("axis", [None, 0, 1, 2])
@pytest.mark.parametrize("shape", [(3, 5, 11), (40, 2, 3), (2, 40, 3), (1, 3, 90)])
def test_pieces_change_nothing(kernel, axis, shape, monkeypatch):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    size = [n if i == axis else 1 for i, n in enumerate(shape)]
    m = CodeMap(torch.rand(size) * 30, -127, 127, shift=torch.randn(size), zero=torch.ones(size))
    key = NoiseKey.of(3)
    want = [slow(x, m, None), slow(x, m, noise_in_memory_order(x, key))]
    for chunk in (1, 2, 7, 32, 64, 10**6):
        monkeypatch.setattr(module, "CHUNK", chunk)
        assert torch.equal(kernel(x, m), want[0]), chunk
        assert torch.equal(kernel(x, m, key), want[1]), chunk


@pytest.mark.parametrize("kernel", KERNELS)
def test_large_and_threads(kernel):
    x = torch.randn(3, (1 << 17) + 5, generator=torch.Generator().manual_seed(2))
    m, key = CodeMap(torch.full((1, 1), 25.0), -127, 127), NoiseKey.of(11)
    want, threads = slow(x, m, noise_in_memory_order(x, key)), torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(kernel(x, m, key), want)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kernel", KERNELS)
def test_ties_go_to_the_even_code(kernel):
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert kernel(x, CodeMap(torch.ones(1), -7, 7)).tolist() == [-2, -2, 0, 0, 2, 2]


@pytest.mark.parametrize("kernel", KERNELS)
def test_extremes_clip(kernel):
    x = torch.tensor([1e30, -1e30, 3.4e38, -3.4e38, 1e-30, 0.0, -0.0])
    m = CodeMap(torch.ones(1), -7, 7)
    for noise in (None, NoiseKey.of(1)):
        assert kernel(x, m, noise).tolist() == [7, -7, 7, -7, 0, 0, 0]


def test_the_input_is_left_alone():
    x = torch.randn(5, 5)
    before = x.clone()
    quantize(x, CodeMap(torch.ones(1, 1), -7, 7, shift=torch.ones(1, 1)), NoiseKey.of(0))
    assert torch.equal(x, before)


def test_both_backends_fill_what_quantizers_pass():
    """A scale, its range and the codes, for values of any number of axes."""
    for backend in [k for k in kernel_table()["quantize_symmetric"] if k.why_not(Request("cpu")) is None]:
        found = torch.empty(3, 1, 1)
        codes = backend.run(torch.tensor([[-14.0, 3.1]]), 7, None, found, None)
        assert codes.tolist() == [[-7, 2]], backend.backend
        assert found.flatten().tolist() == [2.0, -14.0, 14.0]
