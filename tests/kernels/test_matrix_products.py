"""Matrix products of integers: exact for every shape, every memory order, and beyond int32."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradbits.kernels.dispatch import INT32_TERMS, Epilogue, Kernel, Request, kernel_table
from gradbits.kernels.reference import int_product

KERNELS = [k for k in kernel_table()["matmul"] if k.why_not(Request("cpu")) is None]
ONE = torch.ones(())


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def views(x: torch.Tensor) -> list[torch.Tensor]:
    """The same matrix in several memory orders."""
    turned = x.mT.contiguous().mT
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype)
    wide[..., 1::2] = x
    return [x, turned, wide[..., 1::2]]


def same(kernel: Kernel, a: torch.Tensor, b: torch.Tensor) -> None:
    want = (a.double() @ b.double()).float()
    assert torch.equal(kernel.run(a, b, Epilogue(ONE)), want)


SIZES = st.one_of(st.sampled_from([0, 1, 2, 7, 8, 15, 16, 17, 31, 33]), st.integers(0, 70))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.backend)
@settings(max_examples=30, deadline=None)
@given(m=SIZES, k=SIZES, n=SIZES, seed=st.integers(0, 99))
def test_any_shape(kernel, m, k, n, seed):
    a, b = codes(m, k, seed=seed), codes(k, n, seed=seed + 1)
    for x in views(a):
        for y in views(b):
            same(kernel, x, y)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.backend)
@settings(max_examples=40, deadline=None)
@given(
    lead=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    sizes=st.tuples(*[st.integers(0, 9)] * 3),
)
def test_batched(kernel, lead, sizes):
    m, k, n = sizes
    for a in views(codes(*lead, m, k)):
        for b in views(codes(*lead, k, n, seed=1)):
            same(kernel, a, b)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.backend)
@pytest.mark.parametrize("shape", [(1, 5, 1), (1, 1, 1), (3, 1, 4), (1, 64, 33), (40, 1, 1), (1, 1, 40)])
def test_axes_of_size_one_with_odd_strides(kernel, shape):
    m, k, n = shape
    a = codes(m, k).as_strided((m, k), (k, 1) if m > 1 else (1, 1))
    b = codes(k, n, seed=1)
    same(kernel, a, b)
    same(kernel, b.t(), a.t())
    same(kernel, codes(2, m, k)[1:, :, :][0], b)
    same(kernel, codes(m, k, 1)[..., 0], codes(n, k)[None].mT[0])


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.backend)
@pytest.mark.parametrize("k", [INT32_TERMS, INT32_TERMS + 1, 133_145, 200_000, 2 * INT32_TERMS + 3])
@pytest.mark.parametrize(("left", "right"), [(127, 127), (-128, -128), (127, -128)])
def test_sums_beyond_int32(kernel, k, left, right):
    a = torch.full((2, k), left, dtype=torch.int8)
    b = torch.full((k, 3), right, dtype=torch.int8)
    want = torch.tensor(left * right * k, dtype=torch.float64).float()
    assert torch.equal(kernel.run(a, b, Epilogue(ONE)), want.expand(2, 3))


def test_the_split_sum_is_exact_in_its_last_bit():
    k = 200_001
    a, b = torch.full((1, k), 127, dtype=torch.int8), torch.full((k, 1), 127, dtype=torch.int8)
    a[0, -1] = 1
    b[-1, 0] = 1
    total = int_product(a, b)
    assert total.dtype == torch.int64
    assert total.item() == 127 * 127 * 200_000 + 1


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.backend)
def test_the_epilogue_rounds_in_its_order(kernel):
    a, b = codes(9, 300), codes(300, 5, seed=1)
    scale, terms = torch.rand(9, 1) * 1e-3, (torch.randn(9, 5), torch.randn(1, 5))
    bias = torch.randn(1, 5)
    y = (a.double() @ b.double()).float() * scale
    for term in (*terms, bias):
        y = y + term
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(kernel.run(a, b, Epilogue(scale, terms, bias, dtype)), y.to(dtype))
