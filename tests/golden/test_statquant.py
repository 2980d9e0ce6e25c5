"""PTQ, PSQ and BHQ against the official implementation, for every case the file holds.

The official code adds an absolute 1e-8 to every range; ours has no absolute constant, so where official numbers are to
be met the ranges are widened by hand. Codes may differ from the official ones only where a value lies on the boundary
between two codes to within float32.
"""

from __future__ import annotations

import math
import re

import pytest
import torch

from gradbits.core.grain import PerChannel, PerRow, PerTensor
from gradbits.core.qtensor import QTensor
from gradbits.kernels.quantize import quantize
from gradbits.nn.matrix_products import LinearProducts
from gradbits.quantizers.grids import Affine, GridValues
from gradbits.quantizers.householder import Householder, HouseholderBlocks, form_blocks, reflections
from gradbits.quantizers.quantizer import Quantizer
from gradbits.quantizers.ranges import MinMax, min_max

EPS = 1e-8
GRAIN = {"ptq": PerTensor(), "ptqact": PerTensor(), "psq": PerRow(), "bhq": PerRow()}


@pytest.fixture(scope="module")
def data(golden):
    return golden("statquant.npz")


@pytest.fixture(scope="module")
def cases(data):
    """Every (case, method, bits) of the file."""
    found = sorted(
        {m.groups() for key in data if (m := re.fullmatch(r"(\w+_\d+x\d+)/(ptq|ptqact|psq|bhq)/b(\d+)/scale", key))}
    )
    assert found, "the file holds no quantizer case"
    return [(case, method, int(bits)) for case, method, bits in found]


def noise_of(k: torch.Tensor) -> torch.Tensor:
    return ((k.double() + 0.5) / 65536 - 0.5).float()


def official(x: torch.Tensor, method: str, bits: int) -> tuple[torch.Tensor, GridValues, HouseholderBlocks | None]:
    """Our parts on the official ranges: rotated values, the grid, and the rotation."""
    turn = None
    if method == "bhq":
        low, high = min_max(x, PerRow())
        turn = reflections(form_blocks((high - low).flatten() + EPS))
        x = turn.forward(x)
    low, high = min_max(x, GRAIN[method])
    low, high = low - EPS, high + EPS
    grid = Affine(bits=bits, zero="widen" if method == "ptq" else "none")
    return x, grid.place(low, high), turn


def as_qtensor(x: torch.Tensor, placed: GridValues, turn, noise: torch.Tensor, grain, bits: int) -> QTensor:
    codes = quantize(x, placed.code_map, noise)
    return QTensor(
        codes=codes,
        scale=placed.scale,
        bits=bits,
        shape=x.shape,
        grain=grain,
        zero_point=placed.zero_point,
        offset=placed.offset,
        rotation=turn,
    )


def assert_same_codes(got: torch.Tensor, want: torch.Tensor, exact: torch.Tensor) -> None:
    """Codes are equal, but for values whose exact position is within float32 of a boundary between two codes."""
    different = got != want
    to_boundary = (exact - torch.floor(exact) - 0.5).abs()
    limit = 2e-6 * exact.abs().clamp(min=1.0) + 1e-5
    assert bool((to_boundary[different] < limit[different]).all()), "codes differ away from a boundary"
    assert int((got - want).abs().max()) <= 1
    assert float(different.double().mean()) <= 1e-3


def test_scales_codes_and_values(data, cases):
    for case, method, bits in cases:
        x, v = data[f"{case}/x"], noise_of(data[f"{case}/u_k16"])
        key = f"{case}/{method}/b{bits}"
        scale, zero = data[f"{key}/scale"], data[f"{key}/zero"]
        y, placed, turn = official(x, method, bits)
        tolerance = 1e-4 if method == "bhq" else 2e-6
        torch.testing.assert_close(1.0 / placed.scale.flatten(), scale, rtol=tolerance, atol=0)
        q = as_qtensor(y, placed, turn, v, GRAIN[method], bits)
        half = 1 << (bits - 1)
        exact = (y.double() - zero.double().view(-1, 1)) * scale.double().view(-1, 1) + v.double()
        got, want = q.codes.int() + half, data[f"{key}/codes"].int()
        if method == "bhq":  # the transform differs in its last bits
            assert int((got - want).abs().max()) <= 1, key
            assert float((got != want).double().mean()) <= 1e-3, key
        else:
            assert_same_codes(got, want, exact)
        deq, name = q.dequantize(), f"{key}/deq"
        if name not in data:
            deq, name = deq[::8, ::16], f"{key}/deq_sub"
        same = got == want if name.endswith("deq") else (got == want)[::8, ::16]
        if method == "bhq":  # one code off moves a whole block's column
            columns = same.all(dim=0)
            deq, want_values = deq[:, columns], data[name][:, columns]
        else:
            deq, want_values = deq[same], data[name][same]
        largest = float(x.abs().max())
        torch.testing.assert_close(deq, want_values, rtol=1e-5, atol=2e-6 * largest)


def test_transform_and_partition(data, cases):
    names = sorted({case for case, method, _ in cases if method == "bhq"})
    assert names, "the file holds no Householder case"
    for case in names:
        blocks = form_blocks(data[f"{case}/bhq/row_range"])
        turn = reflections(blocks)
        eye = torch.eye(blocks.leader.numel())
        for got, name in ((turn.forward(eye), "T"), (turn.inverse(eye), "T_inv")):
            want = data[f"{case}/bhq/{name}"]
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6 * float(want.abs().max()))
        group = data[f"{case}/bhq/group"]
        assert torch.equal(group.view(-1, 1) == group, blocks.leader.view(-1, 1) == blocks.leader)
        leads = blocks.leader == torch.arange(len(eye))
        assert torch.equal(leads, data[f"{case}/bhq/is_leader"].bool())
        assert int(leads.sum()) == int(data[f"{case}/bhq/num_groups"])
        torch.testing.assert_close(data[f"{case}/bhq/T_inv"].square().sum(0), turn.norm, rtol=1e-4, atol=0)


def each_variance(y: torch.Tensor, placed: GridValues) -> torch.Tensor:
    """Exact variance f(1-f) s² of every element that is rounded."""
    shift = 0.0 if placed.offset is None else placed.code_map.shift.double()
    t = (y.double() - shift) / placed.scale.double()
    f = t - torch.floor(t)
    return placed.scale.double().square() * f * (1.0 - f)


def test_variances(data, cases):
    for case, method, bits in cases:
        key = f"{case}/{method}/b{bits}"
        y, placed, turn = official(data[f"{case}/x"], method, bits)
        each = each_variance(y, placed)
        rows = each.sum(1) if turn is None else (turn.inverse(torch.eye(len(y))).double().square() @ each).sum(1)
        want = data[f"{key}/analytic_var_rowsum"].double()
        torch.testing.assert_close(rows, want, rtol=2e-3, atol=1e-5 * float(want.max()))
        total = float(rows.sum())
        assert total == pytest.approx(float(data[f"{key}/analytic_var_total"]), rel=1e-3)
        if turn is not None:  # each column of the inverse has the norm that the bound is built on
            assert float((turn.norm.double() * each.sum(1)).sum()) == pytest.approx(total, rel=1e-4)


def test_our_default_is_never_worse(data, cases):
    """The fallback keeps BHQ's bound at or below that of PSQ, which is at or below that of PTQ."""
    for case, bits in sorted({(c, b) for c, m, b in cases if m == "bhq"}):
        x = data[f"{case}/x"]
        bounds = []
        for quantizer in (
            Quantizer(grid=Affine(bits=bits), range=MinMax(), rounding="stochastic"),
            Quantizer(grid=Affine(bits=bits), range=MinMax(), rounding="stochastic", grain="row"),
            Quantizer(
                grid=Affine(bits=bits), range=MinMax(), rounding="stochastic", grain="row", rotation=Householder()
            ),
        ):
            q = quantizer.quantize(x)
            norm = 1.0 if q.rotation is None else q.rotation.column_norms(x).double()
            bounds.append(float((q.scale.double().square().expand(len(x), 1) / 4 * norm).sum() * x.shape[1]))
        assert bounds[2] <= bounds[1] * (1 + 1e-6) <= bounds[0] * (1 + 2e-6)


def test_monte_carlo_moments(data, cases):
    """Our mean over draws and the official one agree with each other, and the variances too.

    Bernstein's inequality, because elements close to a code hardly ever move: false alarm 1e-6 per case.
    """
    stored = [(c, m, b) for c, m, b in cases if f"{c}/{m}/b{b}/mc_err_mean" in data]
    assert stored, "the file holds no case with Monte Carlo moments"
    torch.manual_seed(11)
    for case, method, bits in stored:
        draws = max(10, min(200, 60_000 // data[f"{case}/x"].numel()))
        x, key = data[f"{case}/x"], f"{case}/{method}/b{bits}"
        y, placed, turn = official(x, method, bits)
        mean, square = torch.zeros_like(x, dtype=torch.float64), torch.zeros_like(x, dtype=torch.float64)
        for _ in range(draws):
            q = as_qtensor(y, placed, turn, torch.rand(x.shape) - 0.5, GRAIN[method], bits)
            error = (q.dequantize() - x).double()
            mean += error
            square += error * error
        mean /= draws
        inverse = torch.eye(len(x)) if turn is None else turn.inverse(torch.eye(len(x)))
        exact = inverse.double().square() @ each_variance(y, placed)
        largest = (inverse.abs() * placed.scale.flatten()).amax(1, keepdim=True).double().expand_as(exact)
        want = data[f"{key}/mc_err_mean"].double()
        while mean.shape != want.shape:  # a sub-grid of rows and columns is stored
            steps = [-(-n // m) for n, m in zip(mean.shape, want.shape, strict=True)]
            mean, exact, largest = (t[:: steps[0], :: steps[1]] for t in (mean, exact, largest))
        weight, count = math.log(2 * want.numel() / 1e-6), 1 / draws + 1 / 2000
        limit = (2 * exact * weight * count).sqrt() + largest * weight * count / 3 + 1e-6 * float(x.abs().max())
        assert bool(((mean - want).abs() <= limit).all()), key
        total = float(data[f"{key}/analytic_var_total"])
        assert float(square.sum()) / draws == pytest.approx(total, rel=0.25), key


def test_linear_layer(data):
    """Both gradients of the official layer, whose weights and inputs are floats: mean over draws, and variance."""
    modes = sorted({m.group(1) for key in data if (m := re.fullmatch(r"linear_(\w+)/grad_out", key))})
    assert modes, "the file holds no layer case"
    draws, products = 200, LinearProducts()
    torch.manual_seed(5)
    for mode in modes:
        prefix = f"linear_{mode}"
        a, w, g = (data[f"{prefix}/{name}"] for name in ("a", "w", "grad_out"))
        by_row = mode in ("psq", "bhq")
        out = products.in_float("output", a, w) + data[f"{prefix}/bias"]
        torch.testing.assert_close(out, data[f"{prefix}/out"], rtol=1e-4, atol=1e-5)
        for_input = Quantizer(
            grid=Affine(bits=5, zero="widen" if mode == "ptq" else "none"),
            range=MinMax(),
            grain=PerRow() if by_row else PerTensor(),
            rounding="stochastic",
            rotation=Householder(fallback=False) if mode == "bhq" else None,
        )
        for_weight = Quantizer(
            grid=Affine(zero="none" if by_row else "widen"),
            range=MinMax(),
            grain=PerChannel(axis=1) if by_row else PerTensor(),
            rounding="stochastic",
        )
        for name, product, quantizer, other in (
            ("ga", "grad_input", for_input, w),
            ("gw", "grad_weight", for_weight, a),
        ):
            exact, var = data[f"{prefix}/{name}_exact"].double(), data[f"{prefix}/{name}_var"].double()
            torch.testing.assert_close(products.in_float(product, g, other).double(), exact, rtol=1e-4, atol=1e-6)
            draw = torch.stack(
                [products.in_float(product, quantizer.quantize(g).dequantize(), other).double() for _ in range(draws)]
            )
            # sums over many elements are close to normal: 6 standard deviations, false alarm below 1e-5
            z = ((draw.mean(0) - exact) / (var / draws).sqrt()).abs()
            assert float(z.max()) < 6.0, f"{prefix}/{name}: {float(z.max()):.1f} standard deviations off"
            assert float(draw.var(0).sum()) == pytest.approx(float(var.sum()), rel=0.15), f"{prefix}/{name}"


def test_one_sided_gradients_differ_from_the_official_code():
    """Official PTQ divides by the code of zero, which is 0 for positive gradients, and returns NaN; ours does not."""
    torch.manual_seed(0)
    nearly = torch.cat([torch.rand(64), torch.tensor([1.0, -0.003])]).view(6, 11)
    for x in (torch.rand(16, 8) + 0.1, nearly, -torch.rand(4, 4)):
        for zero in ("none", "widen"):
            q = Quantizer(grid=Affine(bits=4, zero=zero), range=MinMax(), rounding="stochastic").quantize(x)
            assert bool(torch.isfinite(q.dequantize()).all())
            assert float((q.dequantize() - x).abs().max()) <= float(q.scale) * (1 + 1e-5)


def test_absolute_epsilon_differs_from_the_official_code():
    """The official 1e-8 widens the range of tiny gradients; ours scales with them exactly."""
    torch.manual_seed(0)
    x = torch.randn(16, 32)
    noise = torch.rand(16, 32) - 0.5
    for rotation in (None, Householder()):
        quantizer = Quantizer(
            grid=Affine(bits=5), range=MinMax(), rounding="stochastic", grain="row", rotation=rotation
        )
        usual, tiny = quantizer.quantize(x, noise=noise), quantizer.quantize(x * 2.0**-30, noise=noise)
        assert torch.equal(usual.codes, tiny.codes)
        assert torch.equal(usual.dequantize() * 2.0**-30, tiny.dequantize())


def test_two_rows_differ_from_the_official_code():
    """Official BHQ reads out of bounds with two rows; ours is PSQ there."""
    x = torch.tensor([[1.0, -1.0, 0.5], [1.0, -1.0, 0.25]])
    quantizer = Quantizer(grid=Affine(bits=5), range=MinMax(), grain="row", rotation=Householder())
    for rows in (x, x[:1], x[:0]):
        assert quantizer.quantize(rows).rotation is None
