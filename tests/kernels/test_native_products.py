"""Native products equal the float64 simulation bit for bit, on every instruction set that the processor has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradbits.kernels import simulate
from gradbits.kernels.activations import ACTIVATIONS
from gradbits.kernels.dispatch import Epilogue, Request, choose
from gradbits.kernels.geometry import ConvGeometry
from gradbits.kernels.native import convolutions
from gradbits.kernels.native import products as native

SIZES = st.sampled_from([0, 1, 2, 3, 5, 15, 16, 17, 24, 25, 33, 47, 48, 49, 65, 100, 129])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


def codes(draw, *shape):
    """All int8 codes, -128 included."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)


def epilogue(draw, shape):
    """Scale, terms and bias that vary along any axes."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def operand():
        return torch.randn([n if draw(st.booleans()) else 1 for n in shape], generator=generator)

    terms = tuple(operand() for _ in range(draw(st.integers(0, 3))))
    bias = operand() if draw(st.booleans()) else None
    return Epilogue(operand(), terms, bias, draw(DTYPES), draw(st.sampled_from(ACTIVATIONS)))


def check(got, want):
    """Same dtype, shape and bits."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert torch.equal(got, want)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_matmul(native_level, data):
    """Any shape, either operand transposed, batches; the library's own product and the one that is chosen."""
    draw = data.draw
    lead = draw(st.sampled_from([(), (), (3,), (2, 2), (0,)]))
    m, k, n = draw(SIZES), draw(st.one_of(SIZES, st.sampled_from([1023, 1024, 1025, 2100]))), draw(SIZES)
    a = codes(draw, *lead, m, k) if draw(st.booleans()) else codes(draw, *lead, k, m).mT
    b = codes(draw, *lead, k, n) if draw(st.booleans()) else codes(draw, *lead, n, k).mT
    gaps = k > 1 and draw(st.booleans())
    if gaps:
        a, b = a[..., ::2], b[..., ::2, :]
    e = epilogue(draw, (*lead, m, n))
    want = simulate.matmul(a, b, e)
    check(native.own_matmul(a, b, e), want)
    if not gaps:  # torch._int_mm warns of gaps in memory
        check(native.matmul(a, b, e), want)


@pytest.mark.parametrize(("m", "k", "n"), [(300, 70, 600), (500, 1100, 70), (60, 40, 1300)])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large_products_for_any_number_of_threads(native_level, m, k, n, threads):
    """Several blocks of rows and columns, and of sums."""
    generator = torch.Generator().manual_seed(m)
    a = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=generator)
    b = torch.randint(-128, 128, (k, n), dtype=torch.int8, generator=generator)
    e = Epilogue(torch.rand(m, 1), (torch.randn(1, n),), torch.randn(1, n))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        want = simulate.matmul(a, b, e)
        check(native.matmul(a, b, e), want)
        check(native.own_matmul(a, b, e), want)
        check(native.own_matmul(a.t().contiguous().t(), b, e), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("code", [127, -128])
@pytest.mark.parametrize("transposed", [False, True])
def test_long_sums_do_not_overflow(native_level, code, transposed):
    """200,000 products of the largest codes."""
    a = torch.full((3, 200_000), code, dtype=torch.int8)
    b = a.t().contiguous() if transposed else a.t()
    left = a.t().contiguous().t() if transposed else a
    e = Epilogue(torch.ones(()))
    want = torch.full((3, 3), float(code * code * 200_000))
    check(native.own_matmul(left, b, e), want)
    check(native.matmul(left, b, e), want)


def geometry_of(draw):
    """A convolution of 1 to 3 axes with any stride, padding and dilation, and its channels."""
    d = draw(st.integers(1, 3))

    def each(*values):
        return tuple(draw(st.sampled_from(values)) for _ in range(d))

    kernel, stride, padding, dilation = each(1, 2, 3, 4), each(1, 1, 2, 3), each(0, 1, 2, 3), each(1, 1, 2)
    least = (max(s * (k - 1) + 1 - 2 * p, 1) for s, k, p in zip(dilation, kernel, padding, strict=True))
    size = tuple(n + extra for n, extra in zip(least, each(0, 1, 2, 5), strict=True))
    groups = draw(st.sampled_from([1, 1, 2, 3, 8]))
    ci, co = draw(st.sampled_from([1, 2, 3, 5, 16, 17, 33, 70])), draw(st.sampled_from([1, 2, 4, 16, 17, 50]))
    return ConvGeometry(stride, padding, dilation, groups, size, kernel), ci * groups, co * groups


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_convolutions(native_level, data):
    """All three products; groups, odd images, memory formats, every kind of epilogue."""
    draw = data.draw
    g, ci, co = geometry_of(draw)
    n = draw(st.sampled_from([0, 1, 2, 3]))
    x, w = codes(draw, n, ci, *g.input_size), codes(draw, co, ci // g.groups, *g.kernel_size)
    grad = codes(draw, n, co, *g.output_size)
    if g.spatial == 2 and draw(st.booleans()):
        x, w, grad = (t.to(memory_format=torch.channels_last) for t in (x, w, grad))
    e = epilogue(draw, grad.shape)
    check(convolutions.conv_output(x, w, g, e), simulate.conv_output(x, w, g, e))
    e = epilogue(draw, x.shape)
    check(convolutions.conv_grad_input(grad, w, g, e), simulate.conv_grad_input(grad, w, g, e))
    e = epilogue(draw, w.shape)
    check(convolutions.conv_grad_weight(grad, x, g, e), simulate.conv_grad_weight(grad, x, g, e))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_large_convolutions_for_any_number_of_threads(native_level, threads, order):
    """More columns than one block holds, more positions than one piece."""
    g = ConvGeometry((1, 1), (1, 1), (1, 1), 1, (14, 13), (3, 3))
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-128, 128, (9, 70, 14, 13), dtype=torch.int8, generator=generator)
    w = torch.randint(-128, 128, (530, 70, 3, 3), dtype=torch.int8, generator=generator)
    grad = torch.randint(-128, 128, (9, 530, 14, 13), dtype=torch.int8, generator=generator)
    x, w, grad = (t.contiguous(memory_format=order) for t in (x, w, grad))
    e = Epilogue(torch.tensor(0.01))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check(convolutions.conv_output(x, w, g, e), simulate.conv_output(x, w, g, e))
        check(convolutions.conv_grad_input(grad, w, g, e), simulate.conv_grad_input(grad, w, g, e))
        check(convolutions.conv_grad_weight(grad, x, g, e), simulate.conv_grad_weight(grad, x, g, e))
    finally:
        torch.set_num_threads(before)


def test_the_dispatcher_prefers_the_library(native_level):
    """Whatever the shape; a simulation stays one."""
    for request in (Request("cpu", 27, 2, 1, 1 << 25), Request("cpu", 576, 2, 4, 1 << 21), Request("cpu", 64)):
        op = "conv_output" if request.spatial else "matmul"
        assert choose(op, request).backend == "native"
        assert choose(op, request, "simulate").backend == "simulate"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_depthwise_convolutions(native_level, data):
    """Channels last in 1 to 3 dimensions: whole blocks of lanes and parts of them; taps that meet nothing."""
    draw = data.draw
    g, _, _ = geometry_of(draw)
    channels = draw(st.sampled_from([2, 3, 15, 16, 17, 64, 65, 130]))
    g = replace(g, groups=channels)
    n = draw(st.sampled_from([0, 1, 2, 3]))
    x, w = codes(draw, n, channels, *g.input_size), codes(draw, channels, 1, *g.kernel_size)
    grad = codes(draw, n, channels, *g.output_size)
    x, grad = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, grad))
    e = epilogue(draw, grad.shape)
    check(convolutions.conv_output(x, w, g, e), simulate.conv_output(x, w, g, e))
    e = epilogue(draw, x.shape)
    check(convolutions.conv_grad_input(grad, w, g, e), simulate.conv_grad_input(grad, w, g, e))
    e = epilogue(draw, w.shape)
    check(convolutions.conv_grad_weight(grad, x, g, e), simulate.conv_grad_weight(grad, x, g, e))


@pytest.mark.parametrize("threads", [1, 3])
def test_depthwise_sums_beyond_32_bits(native_level, threads):
    """More products in a sum of ``grad_weight`` than int32 holds."""
    g = ConvGeometry((1,), (1,), (1,), 16, (50_000,), (3,))
    x = torch.full((4, 50_000, 16), -128, dtype=torch.int8).movedim(-1, 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for e in (Epilogue(torch.tensor(1.0)), Epilogue(torch.rand(16, 1, 1), (), None, torch.bfloat16)):
            check(convolutions.conv_grad_weight(x, x, g, e), simulate.conv_grad_weight(x, x, g, e))
    finally:
        torch.set_num_threads(before)
