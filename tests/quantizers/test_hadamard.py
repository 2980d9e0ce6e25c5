"""Block Hadamard rotation: the matrix, outliers, the searched size."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard as sylvester

from gradbits.core.errors import ArgumentError
from gradbits.nn.matrix_products import LinearProducts
from gradbits.quantizers.grids import TwosComplement
from gradbits.quantizers.hadamard import Hadamard, HadamardBlocks, hadamard, sizes_of
from gradbits.quantizers.lsq import MeanStep
from gradbits.quantizers.quantizer import Quantizer


def quantizer(size: int) -> Quantizer:
    return Quantizer(grid=TwosComplement(bits=4), range=MeanStep(), rotation=Hadamard(size=size))


def quantize(x: torch.Tensor, size: int):
    return quantizer(size).quantize(x, state={"hadamard": torch.tensor([size])})


@pytest.mark.parametrize("size", [1, 2, 4, 8, 32, 256])
def test_matrix(size):
    h = hadamard(torch.eye(size), size)
    torch.testing.assert_close(h, torch.tensor(sylvester(size), dtype=torch.float32) / math.sqrt(size))
    torch.testing.assert_close(h, h.t())
    torch.testing.assert_close(h @ h, torch.eye(size), rtol=0, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(0, 5), st.integers(1, 4), st.integers(0, 2))
def test_blocks_along_any_axis(count, power, blocks, axis):
    size = 1 << power
    shape = [count, 3, 2]
    shape.insert(axis, size * blocks)
    x = torch.randn(shape)
    turn = HadamardBlocks(size, axis)
    y = turn.forward(x)
    dense = torch.block_diag(*[torch.tensor(sylvester(size), dtype=torch.float32) / math.sqrt(size)] * blocks)
    torch.testing.assert_close(y, (x.movedim(axis, -1) @ dense).movedim(-1, axis), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(turn.inverse(y), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.norm(), x.norm(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [0, 3, 6, -2, 16])
def test_illegal_sizes(size):
    with pytest.raises(ArgumentError, match="power of two"):
        hadamard(torch.ones(2, 8), size)


def test_illegal_rules():
    for options in ({"size": 3}, {"size": -1}, {"largest": 0}, {"largest": 48}):
        with pytest.raises(ArgumentError, match="Hadamard"):
            Hadamard(**options)


def test_it_cancels_in_the_product():
    x, w = torch.randn(9, 24), torch.randn(5, 24)
    turn = HadamardBlocks(8)
    torch.testing.assert_close(turn.forward(x) @ turn.forward(w).t(), x @ w.t(), rtol=1e-5, atol=1e-5)
    qx, qw = quantize(x, 8), quantize(w, 8)
    y = LinearProducts().product("output", qx, qw)
    torch.testing.assert_close(y, qx.dequantize() @ qw.dequantize().t(), rtol=1e-4, atol=1e-4)


def test_size_one_is_the_plain_grid():
    x = torch.randn(6, 8)
    plain = Quantizer(grid=TwosComplement(bits=4), range=MeanStep()).quantize(x)
    assert torch.equal(quantize(x, 1).codes, plain.codes)
    assert torch.equal(quantize(x, 1).dequantize(), plain.dequantize())


def test_outlier_channels():
    """Two outlier channels among 768: the error falls with the block, as the steps recomputed in the spec's example."""
    torch.manual_seed(0)
    x = torch.randn(256, 768)
    x[:, 10] *= 60
    x[:, 500] *= 40
    error = {size: float((quantize(x, size).dequantize() - x).norm() / x.norm()) for size in (1, 8, 32, 128, 256)}
    for size, expected in {1: 0.87, 8: 0.72, 32: 0.48, 128: 0.17, 256: 0.16}.items():
        assert error[size] == pytest.approx(expected, abs=0.08)


def test_sizes():
    assert sizes_of(96, 1024) == [1, 2, 4, 8, 16, 32]
    assert sizes_of(4096, 1024)[-1] == 1024
    assert sizes_of(7, 1024) == [1]


def settle(rule: Hadamard, x: torch.Tensor, w: torch.Tensor) -> list[int]:
    states = (rule.init_state(), rule.init_state())

    def error(value):
        plain = Quantizer(grid=TwosComplement(bits=4), range=MeanStep())
        return lambda turn: (plain.quantize(turn.forward(value)).dequantize() - turn.forward(value)).norm()

    rule.settle(x.shape[1], [error(x), error(w)], states)
    return [int(state["hadamard"]) for state in states]


def test_search_takes_the_least_product_of_errors():
    torch.manual_seed(1)
    x, w = torch.randn(64, 64), torch.randn(32, 64)
    x[:, 3] *= 50
    found = settle(Hadamard(), x, w)
    plain = Quantizer(grid=TwosComplement(bits=4), range=MeanStep())
    costs = {}
    for size in sizes_of(64, 1024):
        parts = [(plain.quantize(hadamard(v, size)).dequantize() - hadamard(v, size)).norm() for v in (x, w)]
        costs[size] = float(parts[0] * parts[1])
    best = min(costs, key=costs.__getitem__)
    assert found == [best, best]
    assert best > 1


def test_fixed_size_shrinks_to_what_divides():
    assert settle(Hadamard(size=32), torch.randn(8, 24), torch.randn(4, 24)) == [8, 8]


def test_a_batch_with_nan_settles_nothing():
    x = torch.randn(8, 16)
    x[0, 0] = math.nan
    assert settle(Hadamard(), x, torch.randn(4, 16)) == [0, 0]


def test_settled_once():
    rule, state = Hadamard(), {"hadamard": torch.tensor([4])}
    rule.settle(64, [], (state, state))
    assert int(state["hadamard"]) == 4
