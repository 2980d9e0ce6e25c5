"""The block Householder rotation: blocks, reflection, bounds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradbits.quantizers.grids import Affine
from gradbits.quantizers.householder import Householder, form_blocks, reflections
from gradbits.quantizers.quantizer import Quantizer
from gradbits.quantizers.ranges import MinMax


def dense(turn, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrices T and its inverse, which only tests build."""
    eye = torch.eye(count)
    return turn.forward(eye).double(), turn.inverse(eye).double()


def rows(count: int, width: int, sigma: float, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    size = torch.exp(sigma * torch.randn(count, 1, generator=g))
    return torch.randn(count, width, generator=g) * size


def bhq(bits: int, fallback: bool = True) -> Quantizer:
    return Quantizer(
        grid=Affine(bits=bits),
        range=MinMax(),
        grain="row",
        rounding="stochastic",
        rotation=Householder(fallback=fallback),
    )


def psq(bits: int) -> Quantizer:
    return Quantizer(grid=Affine(bits=bits), range=MinMax(), grain="row", rounding="stochastic")


def ptq(bits: int) -> Quantizer:
    return Quantizer(grid=Affine(bits=bits), range=MinMax(), rounding="stochastic")


def exact_variance(quantizer: Quantizer, x: torch.Tensor) -> float:
    """Sum of the exact variances f(1-f) s² |T^-1 column|², without sampling noise."""
    q = quantizer.quantize(x)
    turned = x if q.rotation is None else q.rotation.forward(x)
    half = 1 << (quantizer.bits - 1)
    scale = q.scale.double()
    t = (turned.double() - q.offset.double()) / scale.clamp(min=1e-300) + half
    f = t - torch.floor(t)
    norm = 1.0 if q.rotation is None else q.rotation.column_norms(x).double()
    return float((norm * scale.square() * f * (1 - f)).sum())


def bound(quantizer: Quantizer, x: torch.Tensor) -> float:
    q = quantizer.quantize(x)
    norm = 1.0 if q.rotation is None else q.rotation.column_norms(x).double()
    return float((q.scale.double().square().expand(len(x), 1) * norm).sum()) * x.shape[1] / 4


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 70), st.floats(0, 3), st.integers(0, 10_000))
def test_blocks_partition_the_rows(count, sigma, seed):
    ranges = rows(count, 1, sigma, seed).abs().flatten()
    blocks = form_blocks(ranges)
    leads = torch.nonzero(blocks.leader == torch.arange(count)).flatten()
    assert len(leads) >= 1
    for lead in leads:
        members = blocks.leader == lead
        assert int(members.sum()) == int(blocks.size[lead])
        assert float(ranges[lead]) >= float(ranges[members].max()) - 1e-12
        others = ranges[members & (torch.arange(count) != lead)]
        if len(others):
            assert float(blocks.follower_range[lead]) == pytest.approx(float(others.max()))
    # the smallest leader would be entitled to more than one follower, and with one follower fewer it would not
    followers = count - len(leads)
    v = ranges.double().sort(descending=True).values
    if len(leads) > 1:
        assert followers * v[count - followers - 1] / v[: count - followers].sum() > 1
    if followers > 1:
        assert (followers - 1) * v[count - followers] / v[: count - followers + 1].sum() <= 1


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 60), st.floats(0, 3), st.integers(0, 10_000))
def test_transform_is_invertible_and_block_diagonal(count, sigma, seed):
    x = rows(count, 5, sigma, seed)
    blocks = form_blocks(x.amax(1) - x.amin(1))
    turn = reflections(blocks)
    forward, inverse = dense(turn, count)
    assert float((forward @ inverse - torch.eye(count)).abs().max()) < 1e-5
    together = blocks.leader.view(-1, 1) == blocks.leader
    assert bool((forward[~together] == 0).all())
    h = forward / turn.scale.double()  # what is left without the row scales
    assert float((h @ h.t() - torch.eye(count)).abs().max()) < 1e-5
    first = h.gather(1, blocks.leader.view(-1, 1)).flatten()
    assert float((first - blocks.size.double().rsqrt()).abs().max()) < 1e-6
    assert float((inverse.square().sum(0) / turn.norm.double() - 1).abs().max()) < 1e-4


def test_dense_householder_is_the_textbook_one():
    x = torch.zeros(5, 3)
    x[2] = torch.tensor([9.0, -9.0, 0.0])
    x[0, 0] = 1e-2
    turn = reflections(form_blocks(x.amax(1) - x.amin(1)))
    h = dense(turn, 5)[0] / turn.scale.double()
    e, ones = torch.zeros(5, dtype=torch.float64), torch.full((5,), 5**-0.5, dtype=torch.float64)
    e[2] = 1.0
    v = (ones - e) / (ones - e).norm()
    torch.testing.assert_close(h, torch.eye(5, dtype=torch.float64) - 2 * torch.outer(v, v), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.0, 2.0, 3.0])
def test_variance_order(sigma):
    for seed in range(12):
        count = 32 + 4 * seed if sigma >= 2 else 3 + 6 * seed
        x = rows(count, 16 + 20 * seed, sigma, seed)
        for bits in (4, 8):
            tensor, row, block = (exact_variance(q(bits), x) for q in (ptq, psq, bhq))
            assert row <= 0.99 * tensor
            assert block <= 1.2 * row
            if sigma >= 2:
                assert block <= 0.5 * row
            assert bound(bhq(bits), x) <= bound(psq(bits), x) * (1 + 1e-6) <= bound(ptq(bits), x) * (1 + 2e-6)
            assert exact_variance(bhq(bits), x) <= bound(bhq(bits), x)


@pytest.mark.parametrize("bits", [4, 8])
def test_one_dominant_row_gains_its_block_size(bits):
    x = rows(64, 128, 0.0, 1) * 1e-3
    x[17] *= 1e3
    assert exact_variance(psq(bits), x) / exact_variance(bhq(bits), x) >= 0.8 * 64


def test_flat_rows_fall_back_to_one_scale_per_row():
    x = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    assert bhq(5).quantize(x).rotation is None
    assert torch.equal(bhq(5).quantize(x).scale, psq(5).quantize(x).scale)
    # without the fallback the bound does rise
    assert bound(bhq(5, fallback=False), x) > bound(psq(5), x)


def test_blocks_fall_back_one_by_one():
    """Rows of one size stay as they are beside blocks that pay."""
    x = rows(40, 300, 0.3, 0)
    turn = bhq(5).quantize(x).rotation
    y = turn.forward(x)
    alone = turn.block == turn.leader.numel()
    assert 0 < int(alone.sum()) < 40
    assert torch.equal(y[alone], x[alone])
    assert torch.equal(turn.inverse(x)[alone], x[alone])
    assert not torch.equal(y, x)
    torch.testing.assert_close(turn.inverse(y), x, rtol=1e-4, atol=1e-5)
    assert bound(bhq(5), x) < bound(psq(5), x)


def test_unbiased():
    """Bernstein's inequality for every element: false alarm 1e-6."""
    x = rows(24, 40, 1.5, 3)
    x[5] *= 30
    draws, quantizer = 600, bhq(4)
    torch.manual_seed(2)
    q = quantizer.quantize(x)
    mean = torch.zeros_like(x, dtype=torch.float64)
    for _ in range(draws):
        mean += quantizer.quantize(x).dequantize().double()
    inverse = dense(q.rotation, len(x))[1]
    scale = q.scale.double()
    t = (q.rotation.forward(x).double() - q.offset.double()) / scale
    f = t - torch.floor(t)
    var = inverse.square() @ (scale.square() * f * (1 - f))
    largest = (inverse.abs() * scale.flatten()).amax(1, keepdim=True)
    weight = math.log(2 * x.numel() / 1e-6)
    limit = (2 * var * weight / draws).sqrt() + largest * weight / (3 * draws) + 1e-5 * float(x.abs().max())
    assert bool(((mean / draws - x.double()).abs() <= limit).all())


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_degenerate_rows(scale):
    x = rows(12, 6, 1.0, 0) * scale
    x[3], x[4] = 0.0, scale
    zeros = torch.zeros(5, 4)
    one_big = torch.zeros(6, 4)
    one_big[2, 1] = scale
    for case in (x, zeros, one_big, torch.full((7, 3), scale), x[:3], x[:2], x[:1], x[:0], x[:, :1]):
        q = bhq(4).quantize(case)
        values = q.dequantize()
        assert values.shape == case.shape
        assert bool(torch.isfinite(values).all())
        step = float(q.scale.max()) if q.scale.numel() else 0.0
        assert float((values - case).abs().max() if case.numel() else 0.0) <= 8 * step + 1e-5 * scale
    assert torch.equal(bhq(4).quantize(zeros).dequantize(), zeros)


def test_scale_equivariance_is_exact():
    x, noise = rows(20, 30, 1.0, 5), torch.rand(20, 30) - 0.5
    a, b = bhq(5).quantize(x, noise=noise), bhq(5).quantize(x * 2.0**-40, noise=noise)
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.dequantize() * 2.0**-40, b.dequantize())


def test_permuting_rows_permutes_the_transform():
    x = rows(30, 8, 1.5, 9)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    a, b = (form_blocks(v.amax(1) - v.amin(1)) for v in (x, x[order]))
    same = a.leader.view(-1, 1) == a.leader
    assert torch.equal(same[order][:, order], b.leader.view(-1, 1) == b.leader)
    torch.testing.assert_close(reflections(a).norm[order], reflections(b).norm)


def test_non_finite_rows_do_not_break_the_plan():
    for bad in (math.nan, math.inf, -math.inf):
        x = rows(16, 8, 1.0, 4)
        x[6, 2] = bad
        values = bhq(5).quantize(x).dequantize()
        assert not bool(torch.isfinite(values[6]).any())


def test_tokens_of_a_sample_make_one_row():
    x = rows(8, 12, 1.5, 6)  # 8 samples of 3 tokens with 4 features
    noise = torch.rand(24, 4) - 0.5
    quantizer = Quantizer(
        grid=Affine(bits=5), range=MinMax(), grain="row", rounding="stochastic", rotation=Householder(), rows="sample"
    )
    whole = bhq(5).quantize(x, noise=noise.view(8, 12))
    by_token = quantizer.quantize(x.view(24, 4), noise=noise, tokens=3)
    assert torch.equal(whole.codes.view(24, 4), by_token.codes)
    assert torch.equal(whole.dequantize().view(24, 4), by_token.dequantize())
    # the inverse acts on a product with other columns
    weight = torch.randn(4, 7)
    product = by_token.rotation.inverse(by_token.rotation.forward(x.view(24, 4)) @ weight)
    torch.testing.assert_close(product, x.view(24, 4) @ weight, rtol=1e-4, atol=1e-4)


def test_fake_quantization_passes_the_gradient():
    x = rows(9, 5, 1.0, 2).requires_grad_()
    bhq(5).fake_quantize(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(9, 5), rtol=0, atol=1e-5)
