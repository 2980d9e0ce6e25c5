"""Measured bias and variance: against the closed forms, and against quantizers that are biased on purpose."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import gradbits as gb
from gradbits.core.errors import ArgumentError
from gradbits.observe.closed_form import rounding_variance
from gradbits.observe.variance import Moments, measure_variance
from gradbits.observe.variance_plot import save_variance
from gradbits.quantizers.bit_split import BitSplit
from gradbits.quantizers.grids import Affine, Symmetric
from gradbits.quantizers.householder import Householder
from gradbits.quantizers.quantizer import Quantizer
from gradbits.quantizers.ranges import MinMax


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(96, 12),
        nn.ReLU(),
        nn.Linear(12, 4),
    )


def problem(recipe) -> tuple[nn.Module, callable]:
    net = network()
    gb.quantize_(net, recipe)
    x, y = torch.randn(32, 1, 8, 8), torch.randint(0, 4, (32,))
    return net, lambda: nn.functional.cross_entropy(net(x), y)


RECIPES = {
    "int8_dynamic": {},
    "statquant_ptq": {"gradient_bits": 5},
    "statquant_psq": {"gradient_bits": 4, "zero": "widen"},
    "statquant_bhq": {"gradient_bits": 4},
    "adaptive_int8": {"threshold": 0.0, "keep_float": ()},
    "int4_transformer": {"learned_steps": False},
}


@pytest.mark.parametrize("name", RECIPES)
def test_measured_variance_is_the_predicted_one(name):
    net, run = problem(gb.recipe(name, **RECIPES[name]))
    report = measure_variance(net, run, draws=60)
    assert [r.product for r in report.rows].count("grad_weight") == 4
    assert [r.product for r in report.rows].count("grad_input") == 3  # the images need no gradient
    for row in report.rows:
        # a mask behind the product takes variance away that the closed form still counts
        low = 0.75 if name == "int4_transformer" else 0.85
        assert low * row.predicted < row.variance < 1.2 * row.predicted, row
        assert row.predicted <= row.bound * (1 + 1e-6)
        assert abs(row.bias_z) < 5, row
        assert row.relative == row.variance / row.size


def test_order_of_the_three_quantizers():
    spread = []
    for name in ("statquant_ptq", "statquant_psq", "statquant_bhq"):
        net, run = problem(gb.recipe(name, gradient_bits=4))
        spread.append(measure_variance(net, run, draws=30).total("grad_input"))
    assert spread[0] > spread[1] > spread[2]


@pytest.mark.parametrize("name", ["statquant_bhq", "int4_transformer"])
def test_network_scope_adds_what_deeper_layers_pass_on(name):
    net, run = problem(gb.recipe(name, **RECIPES[name]))
    alone = measure_variance(net, run, draws=30)
    together = measure_variance(net, run, draws=30, scope="network")
    by_key = {(r.layer, r.product): r for r in together.rows}
    assert by_key.keys() == {(r.layer, r.product) for r in alone.rows}
    first = next(r for r in alone.rows if r.layer == "0")
    assert by_key["0", "grad_weight"].variance > 1.3 * first.variance
    for row in together.rows:
        assert abs(row.bias_z) < 5, row
        assert math.isnan(row.bound)


def test_a_biased_quantizer_is_caught():
    clipped = gb.recipe("statquant_psq")
    nearest = replace(clipped.grad_input.gradient, rounding="nearest", grid=Affine(bits=3))
    net, run = problem(replace(clipped, grad_input=replace(clipped.grad_input, gradient=nearest)))
    rows = [r for r in measure_variance(net, run, draws=10).rows if r.product == "grad_input"]
    for row in rows:
        assert row.variance < 1e-12 * row.size
        assert row.bias > 0.01 * math.sqrt(row.size)
        assert row.bias_z > 50


def test_everything_is_left_as_it_was():
    net, run = problem(gb.recipe("int4_transformer"))
    run().backward()
    before = copy.deepcopy(net.state_dict())
    grads = [p.grad.clone() for p in net.parameters()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    measure_variance(net, run, draws=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), grads, strict=True))
    assert all(m.training for m in net.modules())
    assert not any("run" in vars(m) for m in net.modules())
    with pytest.raises(ZeroDivisionError):
        measure_variance(net, lambda: run() * (1 / 0), draws=3)
    assert not any("run" in vars(m) for m in net.modules())
    fresh, run = problem(gb.recipe("int4_transformer"))
    measure_variance(fresh, run, draws=3)
    assert int(fresh[0].quantizers.output_input_started) == 0


def test_shared_layers_and_attention():
    torch.manual_seed(0)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.product = nn.Linear(6, 6), gb.nn.Matmul()

        def forward(self, x):
            x = self.linear(self.linear(x))
            return self.product(x.softmax(-1), x.mT)

    net, x = Twice(), torch.randn(3, 4, 6)
    gb.quantize_(net, "statquant_psq")
    report = measure_variance(net, lambda: net(x).square().sum(), draws=40)
    assert {r.layer for r in report.rows} == {"linear", "linear#2", "product"}
    for row in report.rows:
        assert 0.7 * row.predicted < row.variance < 1.3 * row.predicted, row
        assert abs(row.bias_z) < 5


def test_illegal_calls():
    net, run = problem("int8_dynamic")
    for options in ({"draws": 1}, {"scope": "galaxy"}):
        with pytest.raises(ArgumentError):
            measure_variance(net, run, **options)
    with pytest.raises(ArgumentError, match="scalar loss"):
        measure_variance(net, lambda: net(torch.randn(2, 1, 8, 8)), draws=3)
    with pytest.raises(ArgumentError, match="quantize_ first"):
        measure_variance(network(), run, draws=3)
    other = nn.Linear(2, 2)
    with pytest.raises(ArgumentError, match="took part"):
        measure_variance(net, lambda: other(torch.ones(1, 2)).sum(), draws=3)


def test_report_as_text_and_json():
    net, run = problem("statquant_bhq")
    report = measure_variance(net, run, draws=4, scope="network")
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert len(data["rows"]) == len(report.rows)
    assert data["rows"][0]["bound"] is None
    lines = str(report).splitlines()
    assert lines[0].split()[:3] == ["layer", "product", "|grad|^2"]
    assert len(lines) == len(report.rows) + 2
    assert "nan" not in str(report)


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    reports = {}
    for name in ("statquant_ptq", "statquant_psq"):
        net, run = problem(name)
        reports[name] = measure_variance(net, run, draws=3)
    save_variance(tmp_path / "variance.png", reports, "title")
    assert (tmp_path / "variance.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "quantizer",
    [
        Quantizer(grid=Symmetric(bits=4), rounding="stochastic"),
        Quantizer(grid=Affine(bits=3), range=MinMax(), grain="row", rounding="stochastic"),
        Quantizer(grid=Affine(bits=3, zero="widen"), range=MinMax(), rounding="stochastic"),
        Quantizer(grid=BitSplit(bits=3), rounding="stochastic"),
        Quantizer(
            grid=Affine(bits=3), range=MinMax(), grain="row", rounding="stochastic", rotation=Householder()
        ),
    ],
    ids=str,
)
def test_rounding_variance(quantizer):
    torch.manual_seed(0)
    x = torch.randn(12, 9) * torch.exp(torch.randn(12, 1))
    exact, bound = rounding_variance(quantizer.quantize(x), x, quantizer.grid.levels)
    draws = torch.stack([quantizer.quantize(x).dequantize().double() for _ in range(1500)])
    assert float(exact.sum()) == pytest.approx(float(draws.var(0).sum()), rel=0.06)
    assert float(exact.sum()) <= float(bound.sum())


def test_the_test_for_bias_has_its_level():
    """Correlated noise without bias: z stays small; a bias of a tenth of the noise's size shows."""
    torch.manual_seed(0)
    mix, zs = torch.randn(10, 6000), []
    for _ in range(40):
        moments = Moments(torch.zeros(6000))
        for _ in range(40):
            moments.add(torch.randn(10) @ mix)
        zs.append(moments.row("", "", 0.0, 0.0).bias_z)
    assert max(map(abs, zs)) < 6
    assert abs(sum(zs) / len(zs)) < 1
    biased = Moments(torch.zeros(6000))
    for _ in range(40):
        biased.add(torch.randn(10) @ mix + mix[0])
    assert biased.row("", "", 0.0, 0.0).bias_z > 6


def test_layers_with_folded_batch_norms_are_exact():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
    gb.quantize_(net, "qat_int8")
    x = torch.randn(6, 2, 6, 6)
    report = gb.observe.measure_variance(net, lambda: net(x).square().mean(), draws=3)
    assert {row.layer for row in report.rows} == {"0", "4"}
    for row in report.rows:
        assert (row.predicted, row.bound) == (0.0, 0.0)
        assert row.variance < 1e-9 * row.size  # float32's rounding
