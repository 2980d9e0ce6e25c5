"""Native quantization equals the torch reference bit for bit, on every instruction set that the processor has."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradbits.core.noise import NoiseKey
from gradbits.kernels import coding
from gradbits.kernels import quantize as reference
from gradbits.kernels.native import library
from gradbits.kernels.native import quantize as native
from gradbits.kernels.quantize import CodeMap

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = st.sampled_from([0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 63, 64, 65, 130])


def values(shape, dtype, seed):
    """Values of very different sizes, zeros and ties among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-3, 3, shape, generator=generator)
    ties = torch.randint(-20, 20, shape, generator=generator) / 2
    return torch.where(torch.rand(shape, generator=generator) < 0.3, ties, x).to(dtype)


def code_map(shape, affine, seed):
    """Parameters of every sign; some scales are 0."""
    generator = torch.Generator().manual_seed(seed)
    inverse = torch.rand(shape, generator=generator) * 20
    inverse = torch.where(torch.rand(shape, generator=generator) < 0.2, torch.ones(()), inverse)
    if not affine:
        return CodeMap(inverse, -127, 127)
    zero = torch.randint(-128, 128, shape, generator=generator).float()
    return CodeMap(inverse, -128, 127, torch.randn(shape, generator=generator), zero)


def check(x, m, noise):
    """Compare codes, shape and strides."""
    want, got = reference.quantize(x, m, noise), native.quantize(x, m, noise)
    assert got.dtype == torch.int8
    order = native.memory_order(want)
    assert order is not None
    assert got.permute(order).is_contiguous()
    assert torch.equal(got, want)


def noise_of(kind, shape, seed):
    """Each kind of rounding noise."""
    if kind == "tensor":
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 0.5
    return NoiseKey.of(seed, 3) if kind == "key" else None


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(SIZES, min_size=0, max_size=4).filter(lambda s: math.prod(s) < 200_000),
    axis=st.integers(-1, 3),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["nearest", "key", "tensor"]),
    affine=st.booleans(),
    layout=st.sampled_from(["plain", "turned", "gaps", "channels_last"]),
    seed=st.integers(0, 1000),
)
def test_equals_the_reference(native_level, shape, axis, dtype, kind, affine, layout, seed):
    """Shapes, parameter axes, dtypes, noise, memory layouts."""
    if layout == "gaps" and shape:
        shape = [*shape[:-1], 2 * shape[-1]]
    x = values(tuple(shape), dtype, seed)
    if layout == "turned":
        x = x.transpose(0, -1) if x.dim() > 1 else x
    elif layout == "gaps" and shape:
        x = x[..., ::2]
    elif layout == "channels_last" and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    grain = tuple(n if i == axis else 1 for i, n in enumerate(x.shape))
    check(x, code_map(grain, affine, seed), noise_of(kind, x.shape, seed))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("kind", ["nearest", "key"])
def test_threads_do_not_matter(native_level, threads, kind):
    """Large enough for several tasks, at an odd size."""
    x = values((3, 101_111), torch.float32, 5)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for grain in ((1, 1), (3, 1), (1, 101_111)):
            check(x, code_map(grain, True, 2), noise_of(kind, x.shape, 4))
        for axis in (None, 0, 1):
            check_range(x, axis)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("big", [0.0, 1e-30, 1e30, float("inf"), float("-inf"), float("nan")])
def test_extremes_do_not_crash(native_level, dtype, big):
    """Finite extremes clamp as in the reference; codes of NaN are not specified, but are there."""
    x = torch.full((100,), big).to(dtype)
    m = CodeMap(torch.tensor([3.0]), -7, 7)
    got = native.quantize(x, m, NoiseKey.of(1))
    assert got.shape == x.shape
    if not math.isnan(big):
        assert torch.equal(got, reference.quantize(x, m, NoiseKey.of(1)))


def test_every_half_precision_value(native_level):
    """All 65,536 bit patterns of both 16-bit dtypes."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = bits.view(dtype)
        x = x[~x.isnan()]
        for scale in (1.0, 2.0**24, 1e-3):
            check(x, CodeMap(torch.tensor([scale]), -127, 127), None)


def check_range(x, axis):
    """Compare with torch."""
    got, want = native.min_max(x, axis), coding.min_max(x, axis)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(SIZES.filter(bool), min_size=1, max_size=3).filter(lambda s: math.prod(s) < 200_000),
    axis=st.integers(-1, 2),
    dtype=st.sampled_from(DTYPES[:3]),
    turned=st.booleans(),
    bad=st.sampled_from([None, float("nan"), float("inf"), float("-inf")]),
    seed=st.integers(0, 1000),
)
def test_range_equals_aminmax(native_level, shape, axis, dtype, turned, bad, seed):
    """Per tensor and along every axis; NaN and Inf spread as they do there."""
    x = values(tuple(shape), dtype, seed)
    if bad is not None:
        x.view(-1)[seed % x.numel()] = bad
    if turned and x.dim() > 1:
        x = x.transpose(0, -1)
    check_range(x, axis if 0 <= axis < x.dim() else None)


def test_one_openmp_runtime_is_loaded(native_level):
    """A second thread pool would halve the speed of both."""
    assert library.loaded().threads == torch.get_num_threads()
    try:
        with open("/proc/self/maps") as file:
            names = {line.split()[-1] for line in file if "libgomp" in line or "libiomp" in line or "libomp" in line}
    except OSError:
        pytest.skip("this system does not list the libraries of a process")
    assert len(names) == 1


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(SIZES.filter(bool), min_size=0, max_size=4).filter(lambda s: math.prod(s) < 200_000),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["nearest", "key", "tensor"]),
    layout=st.sampled_from(["plain", "turned", "gaps", "channels_last"]),
    factor=st.sampled_from([1.0, 0.0, -0.0, 1e-42, 1e30, float("nan"), float("inf"), float("-inf")]),
    largest=st.sampled_from([1, 7, 127]),
    seed=st.integers(0, 1000),
)
def test_symmetric_equals_the_reference(native_level, shape, dtype, kind, layout, factor, largest, seed):
    """Scale, range and codes in one call: also of zeros, tiny values and what is not finite."""
    x = values(tuple(shape), dtype, seed)
    if layout == "turned":
        x = x.transpose(0, -1) if x.dim() > 1 else x
    elif layout == "gaps" and x.dim() and x.shape[-1] > 1:
        x = x[..., ::2]
    elif layout == "channels_last" and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    x = x * factor
    noise = noise_of(kind, x.shape, seed)
    found, wanted = torch.empty(3), torch.empty(3)
    got = native.quantize_symmetric(x, largest, noise, found)
    want = reference.quantize_symmetric(x, largest, noise, wanted)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    if bool(torch.isfinite(wanted).all()):
        assert torch.equal(got, want)
