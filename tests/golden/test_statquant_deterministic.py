"""The deterministic activation and weight quantizers of StatQuant, for every case the file holds.

By design ours has no absolute constant in its ranges. The official code moves both ends of every range out by 1e-8,
which is invisible at ordinary magnitudes and swallows a tensor whose values are smaller than that.
"""

from __future__ import annotations

import re

import pytest
import torch

from gradbits.core.grain import PerTensor
from gradbits.core.qtensor import QTensor
from gradbits.kernels.quantize import quantize
from gradbits.quantizers.grids import Affine
from gradbits.quantizers.quantizer import Quantizer
from gradbits.quantizers.ranges import MinMax, min_max

EPS = 1e-8
ZERO = {"det_act": "none", "det_weight": "widen"}


@pytest.fixture(scope="module")
def data(golden):
    return golden("statquant.npz")


@pytest.fixture(scope="module")
def cases(data):
    found = sorted(m.groups() for key in data if (m := re.fullmatch(r"(det_\w+)/b(\d+)/codes", key)))
    assert found, "the file holds no deterministic case"
    assert {kind for kind, _ in found} == set(ZERO), "a kind without a rule here"
    return [(kind, int(bits)) for kind, bits in found]


def test_on_the_official_range(data, cases):
    for kind, bits in cases:
        x, name = data[f"{kind}/x"], f"{kind}/b{bits}"
        low, high = min_max(x, PerTensor())
        grid = Affine(bits=bits, zero=ZERO[kind]).place(low - EPS, high + EPS)
        codes = quantize(x, grid.code_map)
        half, want = 1 << (bits - 1), data[f"{name}/codes"].int()
        assert torch.equal(codes.int() + half, want), name
        assert torch.allclose(1 / grid.scale.squeeze(), data[f"{name}/scale"], rtol=1e-6, atol=0), name
        q = QTensor(
            codes=codes,
            scale=grid.scale,
            bits=bits,
            shape=x.shape,
            zero_point=grid.zero_point,
            offset=grid.offset,
        )
        deq = data[f"{name}/deq"]
        assert torch.allclose(q.dequantize(), deq, rtol=1e-5, atol=1e-6 * float(deq.abs().max())), name


def test_on_our_own_range(data, cases):
    for kind, bits in cases:
        x, name = data[f"{kind}/x"], f"{kind}/b{bits}"
        q = Quantizer(grid=Affine(bits=bits, zero=ZERO[kind]), range=MinMax()).quantize(x)
        # the official range is wider by 2e-8 at most, on values of order one: less than float32 resolves
        assert torch.allclose(1 / q.scale.squeeze(), data[f"{name}/scale"], rtol=1e-6, atol=0), name
        off = (q.codes.int() + (1 << (bits - 1)) - data[f"{name}/codes"].int()).abs()
        step = float(q.scale)
        boundary = ((x / step) % 1 - 0.5).abs() if ZERO[kind] == "widen" else (((x - x.min()) / step) % 1 - 0.5).abs()
        assert int(off.max()) <= 1, name
        assert bool((boundary[off > 0] < 1e-4).all()), name


def test_tiny_values_survive(cases):
    """Where the official constant would leave one code for everything, ours keep the shape of the tensor."""
    x = torch.linspace(-1.0, 1.0, 41) * 1e-12
    for kind, bits in cases:
        q = Quantizer(grid=Affine(bits=bits, zero=ZERO[kind]), range=MinMax()).quantize(x)
        assert len(q.codes.unique()) > 2, kind
        assert float((q.dequantize() - x).abs().max()) <= float(q.scale) * 0.501
