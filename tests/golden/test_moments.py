"""Moments over many draws of the official code against closed forms and our own draws, for every case the files hold.

The stored moments are those of ``OFFICIAL`` draws; a z of 6 has a false-alarm rate below 1e-5 for the sizes here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import pytest
import torch

from gradbits.core.grain import PerTensor
from gradbits.core.qtensor import QTensor
from gradbits.nn.matrix_products import LinearProducts
from gradbits.nn.sampling import add_rows
from gradbits.quantizers.bit_split import BitSplit
from gradbits.quantizers.grids import Affine, TwosComplement
from gradbits.quantizers.householder import form_blocks, reflections
from gradbits.quantizers.leverage import draw, row_norms, water_fill
from gradbits.quantizers.lsq import MeanStep, step_gradient
from gradbits.quantizers.quantizer import Quantizer
from gradbits.quantizers.ranges import MinMax, min_max

OFFICIAL, OURS = 2000, 300
EPS = 1e-8
PRODUCTS = LinearProducts()
FOUR_BIT = Quantizer(grid=TwosComplement(bits=4), range=MeanStep())
TWO_DIGITS = Quantizer(grid=Affine(bits=4, zero="widen"), range=MinMax())


@pytest.fixture(scope="module")
def statquant(golden):
    return golden("statquant.npz")


@pytest.fixture(scope="module")
def int4(golden):
    return golden("int4.npz")


def find(data: Iterable[str], pattern: str) -> list[tuple[str, ...]]:
    found = sorted({m.groups() for key in data if (m := re.fullmatch(pattern, key))})
    assert found, f"the file holds nothing like {pattern}"
    return found


def agree(mean: torch.Tensor, exact: torch.Tensor, var: torch.Tensor, draws: float, what: str) -> None:
    """A z-test of every element; where the variance is near zero its own estimate says little, so it has a floor."""
    var = var.double().clamp(min=float(var.double().mean()) / 50)
    z = (mean.double() - exact.double()).abs() / (var / draws).sqrt().clamp(min=1e-30)
    floor = (mean.double() - exact.double()).abs() <= 1e-5 * float(exact.double().abs().max())  # float32 sums
    assert float(torch.where(floor, 0.0, z).max()) < 6.0, what


def variances(x: torch.Tensor, method: str, bits: int) -> torch.Tensor:
    """Exact variance of each element of the official quantizer's result."""
    turn = None
    if method == "bhq":
        low, high = min_max(x, Quantizer(grain="row").grain)
        turn = reflections(form_blocks((high - low).flatten() + EPS))
        x = turn.forward(x)
    low, high = min_max(x, Quantizer(grain="row" if method in ("psq", "bhq") else "tensor").grain)
    placed = Affine(bits=bits, zero="widen" if method == "ptq" else "none").place(low - EPS, high + EPS)
    shift = 0.0 if placed.offset is None else placed.code_map.shift.double()
    t = (x.double() - shift) / placed.scale.double()
    f = t - torch.floor(t)
    each = placed.scale.double().square() * f * (1.0 - f)
    return each if turn is None else turn.inverse(torch.eye(len(x))).double().square() @ each


def test_statquant_variances(statquant):
    """Official draws have the variance of the closed form: in total, by row and where single elements are stored."""
    for case, method, bits in find(statquant, r"(\w+_\d+x\d+)/(ptq|ptqact|psq|bhq)/b(\d+)/mc_var_total"):
        key = f"{case}/{method}/b{bits}"
        exact = variances(statquant[f"{case}/x"], method, int(bits))
        rows, total = exact.sum(1), float(exact.sum())
        assert float(statquant[f"{key}/mc_var_total"]) == pytest.approx(total, rel=0.06), key
        off = (statquant[f"{key}/mc_var_rowsum"].double() - rows).abs()
        assert bool((off <= 0.15 * rows + 0.01 * total).all()), key
        want = statquant[f"{key}/mc_var"].double()
        while exact.shape != want.shape:  # a sub-grid of rows and columns is stored
            steps = [-(-n // m) for n, m in zip(exact.shape, want.shape, strict=True)]
            exact = exact[:: steps[0], :: steps[1]]
        assert float(want.sum()) == pytest.approx(float(exact.sum()), rel=0.15, abs=1e-3 * total), key
        # a bias would add to what the mean of that many draws still moves
        assert float(statquant[f"{key}/mc_bias_l2"]) == pytest.approx(math.sqrt(total / OFFICIAL), rel=0.5), key


def test_statquant_layers_are_unbiased(statquant):
    for mode, name in find(statquant, r"linear_(\w+)/(ga|gw)_mean"):
        prefix = f"linear_{mode}/{name}"
        agree(
            statquant[f"{prefix}_mean"], statquant[f"{prefix}_exact"], statquant[f"{prefix}_var"], OFFICIAL, prefix
        )


def test_statquant_zero_points(statquant):
    """The smallest value that the official code represents."""
    for kind, bits in find(statquant, r"(det_act|det_weight)/b(\d+)/zero"):
        low, high = min_max(statquant[f"{kind}/x"], PerTensor())
        placed = Affine(bits=int(bits), zero="widen" if kind == "det_weight" else "none").place(low - EPS, high + EPS)
        half = 1 << (int(bits) - 1)
        lowest = -half * placed.scale + placed.offset if placed.zero_point is None else (
            (-half - placed.zero_point) * placed.scale
        )  # fmt: skip
        want = statquant[f"{kind}/b{bits}/zero"]
        assert float(lowest) == pytest.approx(float(want), rel=1e-5, abs=1e-6 * float(high - low))


def spread_of(p: torch.Tensor) -> torch.Tensor:
    return torch.where(p > 0, (1 - p) / p.clamp(min=1e-12), 0.0).unsqueeze(1)


def test_sampling_alone(int4):
    """The closed forms of sampled products, and the official draws around them, for both backward products."""
    for case, name in find(int4, r"lss/(\w+)/(gw|ga)_cond_mean_exact"):
        prefix = f"lss/{case}"
        z = int4[f"{prefix}/deq2"].double()
        p = int4[f"{prefix}/prob_{'w' if name == 'gw' else 'a'}"].double()
        if name == "gw":
            other = int4[f"{prefix}/input"].double().repeat(2, 1)
            mean, var = z.t() @ other, (spread_of(p) * z.square()).t() @ other.square()
        else:
            n, other = len(z) // 2, int4[f"{prefix}/weight"].double()
            each = spread_of(p) * (z @ other).square()
            mean, var = (z[:n] + z[n:]) @ other, each[:n] + each[n:]
        for got, kind in ((mean, "mean"), (var, "var")):
            want = int4[f"{prefix}/{name}_cond_{kind}_exact"].double()
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))
        agree(int4[f"{prefix}/{name}_cond_mc_mean"], mean, var, OFFICIAL, f"{prefix}/{name}")
        total = float(int4[f"{prefix}/{name}_cond_mc_var"].double().sum())
        assert total == pytest.approx(float(var.sum()), rel=0.2, abs=1e-12), f"{prefix}/{name}"


def official_digits(g: torch.Tensor, variant: str) -> QTensor:
    if variant == "":
        return Quantizer(grid=BitSplit(bits=4, top=127.5), rounding="stochastic").quantize(g)
    high = TWO_DIGITS.quantize(g)
    low = Quantizer(grid=Affine(bits=4, zero="widen"), range=MinMax(), rounding="stochastic")
    return QTensor(
        codes=high.codes,
        scale=high.scale,
        bits=4,
        shape=g.shape,
        zero_point=high.zero_point,
        rest=low.quantize(g - high.dequantize()),
    )


def test_digits_and_sampling(int4):
    """Our draws of the official digits and rows have the mean and the variance of the official ones."""
    torch.manual_seed(21)
    for case, variant in find(int4, r"lss/(\w+)/((?:asym/)?)gw_full_mc_mean"):
        prefix = f"lss/{case}"
        g, x, w = (int4[f"{prefix}/{name}"].double() for name in ("grad_out", "input", "weight"))
        n = len(g)
        found: dict[str, list[torch.Tensor]] = {"gw": [], "ga": []}
        for _ in range(OURS):
            z = torch.cat([d.dequantize().double() for d in official_digits(g.float(), variant).digits()])
            for name, scores in (("gw", z.norm(dim=1) * x.norm(dim=1).repeat(2)), ("ga", z.norm(dim=1))):
                p = water_fill(scores, n)
                kept = z * torch.where(draw(p, torch.rand(2 * n)), 1 / p, 0.0).unsqueeze(1)
                found[name].append(kept.t() @ x.repeat(2, 1) if name == "gw" else (kept[:n] + kept[n:]) @ w)
        for name, draws in found.items():
            key, stack = f"{prefix}/{variant}{name}_full_mc", torch.stack(draws)
            both = 1 / (1 / OURS + 1 / OFFICIAL)
            if f"{key}_var" in int4:
                var = int4[f"{key}_var"].double()
                assert float(stack.var(0).sum()) == pytest.approx(float(var.sum()), rel=0.25), key
            else:
                var = stack.var(0)
            agree(stack.mean(0), int4[f"{key}_mean"], var, both, key)
            if f"{prefix}/{variant}{name}_full_exact" in int4:
                agree(int4[f"{key}_mean"], int4[f"{prefix}/{variant}{name}_full_exact"], var, OFFICIAL, key)


def test_two_affine_digits(int4):
    """Zero points of the official unbiased digits, and their mean error, which is noise."""
    for (case,) in find(int4, r"split/(\w+)/two_layer_asym/zero1"):
        prefix = f"split/{case}/two_layer_asym"
        x = int4[f"split/{case}/x"]
        high = TWO_DIGITS.quantize(x)
        low = TWO_DIGITS.quantize(x - high.dequantize())
        for number, digit in ((1, high), (2, low)):
            lowest = (-8 - digit.zero_point) * digit.scale
            want = float(int4[f"{prefix}/zero{number}"].flatten()[0])
            assert float(lowest) == pytest.approx(want, rel=1e-3, abs=1e-3 * float(digit.scale))
        mean, var = int4[f"{prefix}/mc_err_mean"].double(), int4[f"{prefix}/mc_var"].double().clamp(min=0)
        largest = float(low.scale)  # Bernstein: elements close to a code hardly ever move
        weight = math.log(2 * mean.numel() / 1e-6)
        limit = (2 * var * 1.5 * weight / OFFICIAL).sqrt() + 2 * largest * weight / (3 * OFFICIAL)
        assert bool((mean.abs() <= limit + 1e-6 * float(x.abs().max())).all()), prefix


def test_official_layer(int4):
    """Gradients of the layer with digits that clip at 6, over our draws: mean and variance are the official ones."""
    torch.manual_seed(22)
    for (case,) in find(int4, r"lss/(\w+)/sp/grad_input_mc_mean"):
        prefix = f"lss/{case}"
        g, x, w = (int4[f"{prefix}/{name}"] for name in ("grad_out", "input", "weight"))
        qx, qw = FOUR_BIT.quantize(x), FOUR_BIT.quantize(w)
        names = ("grad_input", "grad_step_x", "grad_weight_nosample", "grad_step_w_nosample")
        found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        for _ in range(OURS):
            q = Quantizer(grid=BitSplit(bits=4, limit=6), rounding="stochastic").quantize(g)
            p = water_fill(torch.cat([row_norms(d) for d in q.digits()]), len(x))
            to_x = add_rows(PRODUCTS, q.digits(), qw, p, draw(p, torch.rand(len(p))), x.shape)
            to_w = PRODUCTS.product("grad_weight", q, qx)
            grads = (
                *step_gradient(x, qx.scale, to_x, (-8, 7), PerTensor()),
                *step_gradient(w, qw.scale, to_w, (-8, 7), PerTensor()),
            )
            for name, value in zip(names, grads, strict=True):
                found[name].append(value.double())
        for name, draws in found.items():
            stack, var = torch.stack(draws), int4[f"{prefix}/sp/{name}_mc_var"].double()
            mean = int4[f"{prefix}/sp/{name}_mc_mean"]
            agree(stack.mean(0).reshape(mean.shape), mean, var, 1 / (1 / OURS + 1 / OFFICIAL), f"{prefix}/{name}")
            if var.numel() > 1:  # the variance of one number needs more draws than these
                assert float(stack.var(0).sum()) == pytest.approx(float(var.sum()), rel=0.25), f"{prefix}/{name}"
