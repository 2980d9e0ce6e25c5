"""Products that leave float32: infinite where the true sum is, never NaN, and right where it is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradbits as gb
from gradbits.core.grain import PerRow
from gradbits.nn.bilinear import LARGEST, Bilinear
from gradbits.quantizers.bit_split import BitSplit
from gradbits.quantizers.grids import Affine
from gradbits.quantizers.hadamard import Hadamard
from gradbits.quantizers.householder import Householder
from gradbits.quantizers.quantizer import Quantizer
from gradbits.quantizers.ranges import MinMax

GRIDS = {"offset": Affine(), "zero_point": Affine(zero="widen")}
LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "conv": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 2, 4, 5)),
    "groups": (lambda: nn.Conv2d(4, 4, 2, groups=2), (2, 4, 4, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(2, 3, 3), (2, 2, 5)),
}
COMPUTE = ("integer", "simulate")


def values(shape: tuple[int, ...], size: float, seed: int = 0) -> torch.Tensor:
    """Values of one sign and ordinary ones, so that the parts of an affine product have different signs."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 3.0) * size


def right(got: torch.Tensor, exact: torch.Tensor) -> None:
    """Infinite where the exact sum leaves float32 (and nowhere else), close where it does not."""
    assert not bool(torch.isnan(got).any())
    beyond = exact.abs() > LARGEST
    assert torch.equal(torch.isinf(got), beyond)
    assert torch.equal(torch.sign(got)[beyond].double(), torch.sign(exact)[beyond])
    inside = exact[~beyond]
    if inside.numel():
        assert float((got[~beyond].double() - inside).abs().max()) <= 1e-5 * float(inside.abs().max())


def products_of(layer: nn.Module, x: torch.Tensor) -> Bilinear:
    gb.quantize_(layer, "int8_dynamic")
    size = tuple(layer(x).shape[2:]) if getattr(layer, "transposed", False) else tuple(x.shape[2:])
    return layer.products(size)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("size", [1e16, 3e18, 1e22, 1e30])
def test_affine_operands(kind, grid, compute, size):
    make, shape = LAYERS[kind]
    layer = make()
    products = products_of(layer, torch.ones(shape))
    q = Quantizer(grid=GRIDS[grid], range=MinMax())
    x, w = q.quantize(values(shape, size)), q.quantize(-values(layer.weight.shape, size, 1))
    got = products.product("output", x, w, compute=compute)
    right(got, products.in_float("output", x.dequantize(torch.float64), w.dequantize(torch.float64)))
    bias = torch.full((5 if kind == "linear" else layer.out_channels,), 1.0)
    right(
        products.product("output", x, w, bias=bias, compute=compute),
        products.in_float("output", x.dequantize(torch.float64), w.dequantize(torch.float64)),
    )


@pytest.mark.parametrize("compute", COMPUTE)
def test_rows_that_stay_inside_are_right_beside_those_that_do_not(compute):
    products = products_of(nn.Linear(6, 5), torch.ones(4, 6))
    rows = torch.tensor([1.0, 1e30, 1e-6, 1e12]).unsqueeze(1)
    x = Quantizer(grid=Affine(), range=MinMax(), grain=PerRow()).quantize(values((4, 6), 1.0) * rows)
    w = Quantizer(grid=Affine(), range=MinMax()).quantize(values((5, 6), 1e20, 1))
    got = products.product("output", x, w, compute=compute)
    exact = x.dequantize(torch.float64) @ w.dequantize(torch.float64).t()
    for mine, true in zip(got, exact, strict=True):
        right(mine, true)
    assert [bool(torch.isinf(row).all()) for row in got] == [False, True, False, False]


@pytest.mark.parametrize("compute", COMPUTE)
def test_digits(compute):
    products = products_of(nn.Linear(5, 6), torch.ones(1, 5))
    g = Quantizer(grid=BitSplit(), rounding="stochastic").quantize(values((4, 6), 1e30))
    w = Quantizer().quantize(values((6, 5), 1e20, 1))
    got = products.product("grad_input", g, w, compute=compute)
    right(got, g.dequantize(torch.float64) @ w.dequantize(torch.float64))


@pytest.mark.parametrize("compute", COMPUTE)
def test_rotated_rows(compute):
    products = products_of(nn.Linear(5, 6), torch.ones(1, 5))
    rows = torch.tensor([1.0, 1e-3, 1e-3, 1e-3, 1e-3]).unsqueeze(1)
    q = Quantizer(
        grid=Affine(), range=MinMax(), grain=PerRow(), rounding="stochastic", rotation=Householder(fallback=False)
    )
    w = Quantizer(grid=Affine(), range=MinMax()).quantize(values((6, 5), 1e20, 1))
    for size in (1e10, 1e30):
        g = q.quantize(values((5, 6), size) * rows)
        assert g.rotation is not None
        got = products.product("grad_input", g, w, compute=compute)
        assert not bool(torch.isnan(got).any())
        exact = g.dequantize(torch.float64) @ w.dequantize(torch.float64)
        assert bool(torch.isinf(got).all()) == (size == 1e30)
        if size == 1e10:
            assert float((got - exact).norm() / exact.norm()) < 1e-4


@pytest.mark.parametrize("name", [name for name in gb.recipes() if name.startswith("statquant")])
def test_a_layer_overflows_as_its_float_layer_does(name):
    torch.manual_seed(0)
    x = torch.rand(8, 16) + 0.5
    layer, plain = nn.Linear(16, 4), nn.Linear(16, 4)
    with torch.no_grad():
        for each in (layer, plain):
            each.weight.fill_(1e25)
    gb.quantize_(layer, name)
    layer(x)  # starts what a first batch starts
    for each in (layer, plain):
        assert bool((each(x * 1e20) == float("inf")).all())
    assert isinstance(layer(x), torch.Tensor)
    assert bool(torch.isfinite(layer(x)).all())


def test_a_rotation_that_cancels_needs_no_room():
    products = products_of(nn.Linear(8, 5), torch.ones(4, 8))
    q = Quantizer(rotation=Hadamard(size=8))
    states = [q.init_state(), q.init_state()]
    for state in states:
        state["hadamard"].fill_(8)
    x = q.quantize(values((4, 8), 1e10), state=states[0])
    w = q.quantize(values((5, 8), 1e12, 1), state=states[1])
    got = products.product("output", x, w)
    exact = x.dequantize(torch.float64) @ w.dequantize(torch.float64).t()
    assert float((got - exact).norm() / exact.norm()) < 1e-5
