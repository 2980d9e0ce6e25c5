"""Products with ones equal the products that they stand for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradbits.kernels import coding, simulate
from gradbits.kernels.dispatch import Epilogue
from gradbits.kernels.geometry import ConvGeometry
from gradbits.kernels.native import sums as native
from gradbits.kernels.sums import conv_with_ones

SIZES = st.sampled_from([0, 1, 2, 3, 16, 17, 65, 1030])


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(SIZES, min_size=1, max_size=4).filter(lambda s: math.prod(s) < 200_000),
    axis=st.integers(0, 3),
    layout=st.sampled_from(["plain", "turned", "gaps"]),
    seed=st.integers(0, 100),
)
def test_native_sums_equal_the_reference(native_level, shape, axis, layout, seed):
    """Any axis of any shape, in any memory order."""
    codes = torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    if layout == "turned":
        codes = codes.transpose(0, -1)
    elif layout == "gaps":
        codes = codes[..., ::2]
    axis %= codes.dim()
    got, want = native.sum_codes(codes, axis), coding.sum_codes(codes, axis)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert torch.equal(got, want)


@pytest.mark.parametrize("threads", [1, 3])
def test_native_sums_for_any_number_of_threads(native_level, threads):
    """Large enough for several tasks."""
    codes = torch.randint(-128, 128, (3, 70, 5001), dtype=torch.int8)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for axis in range(3):
            assert torch.equal(native.sum_codes(codes, axis), coding.sum_codes(codes, axis))
    finally:
        torch.set_num_threads(before)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_convolutions_with_ones(data):
    """Strides, padding beyond the kernel and dilation, in one to three dimensions."""
    draw = data.draw
    d = draw(st.integers(1, 3))

    def each(*values):
        return tuple(draw(st.sampled_from(values)) for _ in range(d))

    kernel, stride, padding, dilation = each(1, 2, 3), each(1, 2, 3), each(0, 1, 4), each(1, 2)
    least = (max(s * (k - 1) + 1 - 2 * p, 1) for s, k, p in zip(dilation, kernel, padding, strict=True))
    size = tuple(n + extra for n, extra in zip(least, each(0, 1, 2, 5), strict=True))
    g = ConvGeometry(stride, padding, dilation, 1, size, kernel)
    n, ci, co = (draw(st.sampled_from([1, 2, 17])) for _ in range(3))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    x = torch.randint(-128, 128, (n, ci, *size), dtype=torch.int8, generator=rng)
    grad = torch.randint(-128, 128, (n, co, *g.output_size), dtype=torch.int8, generator=rng)
    plain = Epilogue(torch.ones(()))
    ones_x, ones_grad = torch.ones_like(x[:, :1]), torch.ones_like(grad[:, :1])
    weight = {c: torch.ones(*c, *kernel, dtype=torch.int8) for c in ((1, ci), (co, 1))}
    cases = (
        ("conv_output", "input", x, simulate.conv_output(x, weight[1, ci], g, plain)),
        ("conv_grad_input", "gradient", grad, simulate.conv_grad_input(grad, weight[co, 1], g, plain)),
        ("conv_grad_weight", "input", x, simulate.conv_grad_weight(ones_grad, x, g, plain)),
        ("conv_grad_weight", "gradient", grad, simulate.conv_grad_weight(grad, ones_x, g, plain)),
    )
    for op, role, codes, want in cases:
        got = conv_with_ones(op, role, codes, g)
        assert (got.dtype, got.shape) == (torch.float32, want.shape)
        assert torch.equal(got, want), op
