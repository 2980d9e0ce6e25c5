"""Fake quantization on a given grid, forward and gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradbits.core.errors import ArgumentError, DtypeError, GradbitsError
from gradbits.quantizers.fake import fake_quantize


def slow(x: torch.Tensor, s: torch.Tensor, z: torch.Tensor, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
    q = torch.round(x.float() * s.reciprocal()) + z
    return ((q.clamp(low, high) - z) * s).to(x.dtype), (q >= low) & (q <= high)


@settings(max_examples=100, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    low=st.integers(-300, 300),
    count=st.integers(1, 255),
    by_axis=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_equals_the_definition(shape, low, count, by_axis, dtype, seed):
    rng, high = torch.Generator().manual_seed(seed), low + count
    axis = seed % len(shape) if by_axis and shape and shape[seed % len(shape)] else None
    view = [n if i == axis else 1 for i, n in enumerate(shape)]
    scales = torch.rand(torch.Size(view).numel(), generator=rng) * 0.1 + 0.01
    zeros = torch.randint(low, high + 1, scales.shape, generator=rng)
    x = (torch.randn(shape, generator=rng) * 3).to(dtype).requires_grad_()
    y = fake_quantize(x, scales, zeros, low, high, axis)
    want, mask = slow(x.detach(), scales.view(view), zeros.view(view), low, high)
    assert y.dtype == dtype
    assert torch.equal(y, want)
    g = torch.randn(shape, generator=rng).to(dtype)
    y.backward(g)
    assert torch.equal(x.grad, g * mask)


def test_nan_and_inf_come_back():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0], requires_grad=True)
    y = fake_quantize(x, 0.5, 0, -8, 7)
    assert str(y.tolist()) == "[nan, inf, -inf, 1.0]"
    y.backward(torch.ones(4))
    assert x.grad.tolist() == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"x": torch.ones(2, dtype=torch.int32)}, DtypeError),
        ({"x": torch.ones(2, dtype=torch.complex64)}, DtypeError),
        ({"scale": 0.0}, ArgumentError),
        ({"scale": -1.0}, ArgumentError),
        ({"scale": float("nan")}, ArgumentError),
        ({"scale": float("inf")}, ArgumentError),
        ({"scale": True}, DtypeError),
        ({"scale": "1"}, DtypeError),
        ({"scale": torch.ones(2)}, ArgumentError),
        ({"scale": torch.ones(3), "axis": 0}, ArgumentError),
        ({"zero_point": 0.5}, ArgumentError),
        ({"zero_point": None}, DtypeError),
        ({"zero_point": torch.tensor([True, False]), "axis": 0}, DtypeError),
        ({"low": 1 << 31}, ArgumentError),
        ({"high": -8}, ArgumentError),
        ({"low": True}, DtypeError),
        ({"high": 300}, ArgumentError),
        ({"high": 7.0}, DtypeError),
        ({"axis": 1}, ArgumentError),
        ({"axis": "0"}, DtypeError),
    ],
)
def test_illegal_arguments(change, error):
    legal = {"x": torch.ones(2), "scale": 1.0, "zero_point": 0, "low": -8, "high": 7, "axis": None}
    fake_quantize(**legal)
    with pytest.raises(error) as caught:
        fake_quantize(**{**legal, **change})
    assert isinstance(caught.value, GradbitsError)
    assert next(iter(change)) in str(caught.value)
