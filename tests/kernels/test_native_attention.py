"""Attention in 8 bits: the native kernels, integers by torch operations and float64 give the same bits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gradbits.core.noise import NoiseKey
from gradbits.kernels.attention import BLOCK, Attending
from gradbits.kernels.dispatch import kernel_table
from gradbits.kernels.native import attention as native

LENGTHS = st.sampled_from([1, 2, 7, 15, 16, 17, 31, 32, 33, 64, 65, 100])
WIDTHS = st.sampled_from([1, 2, 3, 5, 8, 15, 16, 17, 32, 40, 64, 65, 130])
NOISE = (NoiseKey.of(3, 2), NoiseKey.of(3, 4))


def backend(name):
    return [next(k.run for k in kernel_table()[op] if k.backend == name) for op in ("attention", "attention_gradients")]


def tensors(sizes, *, seed=0, order="heads last", dtype=torch.float32):
    """Return queries, keys, values and a gradient; in memory as layers have them, or in another order."""
    batch, heads, length, keys, width, value_width = sizes
    generator = torch.Generator().manual_seed(seed)
    found = []
    for rows, columns in ((length, width), (keys, width), (keys, value_width), (length, value_width)):
        if order == "heads last":
            x = torch.randn(batch, rows, heads, columns, generator=generator).transpose(1, 2)
        elif order == "columns first":
            x = torch.randn(batch, heads, columns, rows, generator=generator).mT
        else:
            x = torch.randn(1, heads, rows, columns, generator=generator).expand(batch, -1, -1, -1)
        found.append(x.to(dtype))
    return found


def run(functions, q, k, v, g, how):
    forward, backward = functions
    out = forward(q, k, v, how)
    return out, (out.output, *out.saved, *backward(g, out.saved, how, NOISE))


def steps(x):
    return [step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def check(got, want):
    for a, b in zip(got, want, strict=True):
        assert (a.dtype, a.shape, steps(a)) == (b.dtype, b.shape, steps(b))
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_bits_are_those_of_float64(native_level, data):
    draw = data.draw
    sizes = (draw(st.integers(1, 2)), draw(st.integers(1, 3)), *(draw(s) for s in (LENGTHS, LENGTHS, WIDTHS, WIDTHS)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    order = draw(st.sampled_from(["heads last", "columns first", "expanded"]))
    q, k, v, g = tensors(sizes, seed=draw(st.integers(0, 99)), order=order, dtype=dtype)
    q = q * draw(st.sampled_from([1.0, 0.0, 30.0]))
    how = Attending(draw(st.booleans()), draw(st.sampled_from([sizes[4] ** -0.5, 1.0, 3.0])))
    ours = (native.attention, native.attention_gradients)
    check(run(ours, q, k, v, g, how)[1], run(backend("simulate"), q, k, v, g, how)[1])


@pytest.mark.parametrize("causal", [False, True])
def test_integers_by_torch_operations_give_the_same(causal):
    given_ = tensors((2, 2, 40, 70, 24, 16))
    how = Attending(causal, 24**-0.5)
    check(run(backend("reference"), *given_, how)[1], run(backend("simulate"), *given_, how)[1])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(native_level, threads):
    given_, how = tensors((3, 3, 50, 50, 32, 32)), Attending(True, 32**-0.5)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got = run((native.attention, native.attention_gradients), *given_, how)[1]
    finally:
        torch.set_num_threads(before)
    check(got, run(backend("simulate"), *given_, how)[1])


@pytest.mark.parametrize("factor", [1e-30, 1e-18, 1e18, 1e30])
@pytest.mark.parametrize("which", range(4))
def test_any_magnitude(native_level, factor, which):
    """Huge scores see their largest key alone, tiny ones all alike; nothing of it is NaN."""
    given_ = tensors((1, 2, 40, 40, 16, 16))
    given_[which] = given_[which] * factor
    how = Attending(False, 0.25)
    _, got = run((native.attention, native.attention_gradients), *given_, how)
    check(got, run(backend("simulate"), *given_, how)[1])
    assert all(bool(x.isfinite().all()) for x in got)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", range(4))
def test_what_is_not_finite_shows_in_its_own_head(native_level, bad, which):
    given_ = [x.contiguous() for x in tensors((1, 2, 40, 40, 16, 16))]
    given_[which][0, 1, 3, 5] = bad
    out, got = run((native.attention, native.attention_gradients), *given_, Attending(False, 0.25))
    gradients = got[-3:]
    assert all(bool(x[0, 0].isfinite().all()) for x in (out.output, *gradients))
    assert bool(out.output[0, 1].isnan().all()) == (which < 3)
    assert all(bool(x[0, 1].isnan().any()) for x in gradients)


@pytest.mark.parametrize("gap", [7.0, 10.5, 12.0])
def test_probabilities_keep_their_tail(native_level, gap):
    """Thousands of keys that share what one of them leaves get their part, and the gradient that goes with it."""
    keys = 8192
    q, k, v = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, keys, 1), torch.ones(1, 1, keys, 1)
    k[..., 0, 0], v[..., 0, 0] = gap, 0.0
    how, share = Attending(False, 1.0), float((keys - 1) / (keys - 1 + math.exp(gap)))
    out, got = run((native.attention, native.attention_gradients), q, k, v, torch.ones(1, 1, 1, 1), how)
    assert abs(float(out.output) / share - 1) < 0.01
    assert abs(float(got[-1].flatten()[1:].sum()) / share - 1) < 0.01


def test_a_query_that_looks_everywhere_counts_beside_one_that_looks_at_one_key(native_level):
    """The probabilities that a block's values gradients take share one scale."""
    keys = 40_000
    q, k = torch.tensor([20.0, 0.0]).view(1, 1, 2, 1), torch.zeros(1, 1, keys, 1)
    k[..., 0, 0] = 1.0
    v, g = torch.ones(1, 1, keys, 1), torch.tensor([0.0, 1.0]).view(1, 1, 2, 1)
    _, got = run((native.attention, native.attention_gradients), q, k, v, g, Attending(False, 1.0))
    assert abs(float(got[-1].sum()) - 1) < 0.01


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_unbiased(causal):
    """Their mean is the gradient of the products of the codes, whose rounding passes it on as it is."""
    q, k, v, g = (x.double() for x in tensors((1, 1, BLOCK + 8, 30, 8, 8)))
    how = Attending(causal, 8**-0.5)
    forward, backward = backend("simulate")
    saved = forward(q.float(), k.float(), v.float(), how).saved
    values = [
        (codes.double() * scale).unsqueeze(0).requires_grad_()
        for codes, scale in zip(saved[:3], saved[3].double(), strict=True)
    ]
    exact = torch.autograd.grad(F.scaled_dot_product_attention(*values, is_causal=causal), values, g)
    draws = 600
    found = [backward(g.float(), saved, how, (NoiseKey.of(i, 2), NoiseKey.of(i, 4))) for i in range(draws)]
    for gradients, wanted in zip(zip(*found, strict=True), exact, strict=True):
        all_of_them = torch.stack(gradients).double()
        error = (all_of_them.mean(0) - wanted).norm() / wanted.norm()
        one = (all_of_them[0] - wanted).norm() / wanted.norm()
        assert error < 2.5 * one / draws**0.5 + 5e-4
