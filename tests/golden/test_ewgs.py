"""EWGS against the official implementation: discretizer, convolution and Hessian traces, for every case of the file.

The file's probes were drawn by the official loop, whose two defects ``official_behaviour=True`` reproduces; what
follows without the defects is tested against the exact traces that the file holds too.
"""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from torch import nn

import gradbits as gb
from gradbits.nn.quantized import Quantized
from gradbits.nn.twice import twice_differentiable
from gradbits.optim.hessian import hutchinson, measure_deltas_
from gradbits.quantizers.ewgs import discretize
from gradbits.quantizers.interval import UnitInterval
from gradbits.quantizers.quantizer import Quantizer
from gradbits.quantizers.ranges import EMA, MinMax


@pytest.fixture(scope="module")
def data(golden):
    return golden("ewgs.npz")


def cases(data, pattern: str) -> list[re.Match[str]]:
    found = {m[0]: m for key in sorted(data) if (m := re.match(pattern, key))}
    assert found, f"the file holds no case {pattern}"
    return list(found.values())


def bits_of(levels: str) -> int:
    bits = int(levels).bit_length() - 1
    assert 1 << bits == int(levels)
    return bits


def close(got: torch.Tensor, want: torch.Tensor, what: str, rtol: float = 1e-5) -> None:
    atol = max(rtol, 1e-5) * 0.1 * float(want.abs().max()) + 1e-12
    torch.testing.assert_close(got.reshape(want.shape), want, rtol=rtol, atol=atol, msg=lambda m: f"{what}: {m}")


def test_discretizer(data):
    x = data["disc/x"]
    for case in cases(data, r"disc/L(\d+)(?=/out)"):
        n = int(case[1])
        assert torch.equal(discretize(x, n), data[f"{case[0]}/out"])
        grid, unit = UnitInterval(bits=bits_of(case[1])), EMA(of=MinMax())
        state = {"low": torch.zeros(1), "high": torch.ones(1)}
        q = Quantizer(grid=grid, range=unit).quantize(x, state=state, update=False)
        assert torch.equal(q.codes.int() + n // 2, data[f"{case[0]}/codes"].int())


def test_discretizer_gradient(data):
    for case in cases(data, r"disc/L(\d+)/delta([\d.e-]+)/grad_in"):
        x = data["disc/x"].clone().requires_grad_()
        discretize(x, int(case[1]), float(case[2])).backward(data["disc/grad_out"])
        close(x.grad, data[case[0]], case[0])


def convolution(data, name: str, levels: tuple[str, str], delta: float) -> nn.Module:
    """The layer of a case, not started."""
    weight = data[f"{name}/weight"]
    bias = data.get(f"{name}/bias")
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], padding=1, bias=bias is not None)
    conv.load_state_dict({"weight": weight, **({} if bias is None else {"bias": bias})})
    recipe = gb.recipe(
        "ewgs",
        weight_bits=bits_of(levels[0]),
        activation_bits=bits_of(levels[1]),
        delta=delta,
        normalise=False,
        bias_inside=True,
        keep_float=(),
    )
    gb.quantize_(conv, recipe)
    return conv


NAMES = {
    "uW": "weight_high",
    "lW": "weight_low",
    "uA": "input_high",
    "lA": "input_low",
    "output_scale": "weight_output_scale",
}


def load(layer: nn.Module, values: dict[str, torch.Tensor]) -> None:
    for name, value in values.items():
        layer.get_parameter(f"quantizers.output_{NAMES[name]}").data.fill_(float(value))
    for role in ("input", "weight"):
        layer.get_buffer(f"quantizers.output_{role}_started").fill_(1)
    layer.quantizers.output_weight_scaled.fill_(1)


def test_first_batch_starts_intervals_and_factor(data):
    for case in cases(data, r"qconv/W(\d+)A(\d+)(?=/)"):
        name = case[0]
        layer = convolution(data, name, (case[1], case[2]), 0.0)
        layer(data[f"{name}/x"])
        mine = {key: layer.get_parameter(f"quantizers.output_{NAMES[key]}").detach() for key in NAMES}
        close(mine["output_scale"], data[f"{name}/init_output_scale"], name)
        # the intervals used are moved from the initial ones; where the file's two arrays are equal, both are the used
        used = {"uW": mine["uW"] * 0.6, "lW": mine["lW"] * 0.5, "uA": mine["uA"] * 0.4, "lA": mine["lA"] + 0.1}
        for key, value in used.items():
            close(value, data[f"{name}/{key}"], f"{name}/{key}")
            if not torch.equal(data[f"{name}/init_{key}"], data[f"{name}/{key}"]):
                close(mine[key], data[f"{name}/init_{key}"], f"{name}/init_{key}")


@pytest.mark.parametrize("compute", ["integer", "simulate"])
def test_convolution_and_its_gradients(data, compute):
    for case in cases(data, r"qconv/W(\d+)A(\d+)/delta([\d.e-]+)(?=/)"):
        name = f"qconv/W{case[1]}A{case[2]}"
        layer = convolution(data, name, (case[1], case[2]), float(case[3]))
        layer.assignment.compute = compute
        load(
            layer,
            {
                **{k: data[f"{name}/{k}"] for k in ("uW", "lW", "uA", "lA")},
                "output_scale": data[f"{name}/init_output_scale"],
            },
        )
        x = data[f"{name}/x"].clone().requires_grad_()
        y = layer(x)
        close(y.detach(), data[f"{name}/out"], name)
        y.backward(data[f"{name}/grad_out"])
        got = {"x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}
        got.update({key: layer.get_parameter(f"quantizers.output_{NAMES[key]}").grad for key in NAMES})
        for key, value in got.items():
            close(value, data[f"{case[0]}/grad_{key}"], f"{case[0]}/grad_{key}", rtol=1e-4)


def test_quantized_operands(data):
    for case in cases(data, r"qconv/W(\d+)A(\d+)(?=/)"):
        name = case[0]
        layer = convolution(data, name, (case[1], case[2]), 0.0)
        load(layer, {k: data[f"{name}/{k}"] for k in ("uW", "lW", "uA", "lA")})
        output = layer.assignment.recipe.output
        for role, value, want in (("input", "x", "qact"), ("weight", "weight", "qweight")):
            q = getattr(output, role).quantize(data[f"{name}/{value}"], state=layer.state_of("output", role))
            close(q.dequantize(), data[f"{name}/{want}"], f"{name}/{want}")
            if case[1] == "2" and role == "weight":
                assert q.dequantize().unique().tolist() == [-1.0, 1.0]


class Tiny(nn.Module):
    """The network of the Hessian cases."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.c2 = nn.Conv2d(4, 5, 3, stride=2, padding=1, bias=False)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.c2(self.c1(x).relu()).relu().mean((2, 3)))


def tiny(data, name: str, levels: tuple[str, str], **options) -> nn.Module:
    net = Tiny()
    parts = {
        key.removeprefix(f"{name}/param/"): value for key, value in data.items() if key.startswith(f"{name}/param/")
    }
    net.load_state_dict({key: value for key, value in parts.items() if key.endswith(("weight", "bias"))})
    recipe = gb.recipe(
        "ewgs",
        weight_bits=bits_of(levels[0]),
        activation_bits=bits_of(levels[1]),
        **{"keep_float": ("last_linear",), **options},
    )
    gb.quantize_(net, recipe)
    for layer in ("c1", "c2"):
        load(getattr(net, layer), {key: parts[f"{layer}.{key}"] for key in NAMES})
    return net


def losses(data, name: str, net: nn.Module):
    return [
        lambda x=x, y=y: nn.functional.cross_entropy(net(x), y.long())
        for x, y in zip(data[f"{name}/images"], data[f"{name}/labels"], strict=True)
    ]


def stored_probes(data, name: str):
    bits = torch.from_numpy(np.unpackbits(data[f"{name}/probe_bits"].numpy())).float() * 2 - 1
    position = [0]

    def draw(like: torch.Tensor) -> torch.Tensor:
        start = position[0]
        position[0] = start + like.numel()
        return bits[start : position[0]].view(like.shape)

    return draw, position


def test_hessian_factors_with_the_stored_probes(data):
    for case in cases(data, r"hess/W(\d+)A(\d+)(?=/)"):
        name = case[0]
        net = tiny(data, name, (case[1], case[2]), samples=0, official_behaviour=True)
        draw, position = stored_probes(data, name)
        found = measure_deltas_(net, losses(data, name, net), draw=draw)
        counts, sizes = data[f"{name}/call_n_probes"], data[f"{name}/call_numel"]
        assert position[0] == int((counts * sizes).sum())
        for kind, role in (("A", "input"), ("W", "weight")):
            want = data[f"{name}/delta_{kind}"]
            got = torch.tensor([found[layer, role] for layer in ("c1", "c2")])
            close(got, want, f"{name}/delta_{kind}", rtol=1e-3)
            assert float(net.c2.state_of("output", role)["delta"]) == found["c2", role]


def test_traces_gradients_and_probe_counts_of_every_call(data):
    for case in cases(data, r"hess/W(\d+)A(\d+)(?=/)"):
        name = case[0]
        net = tiny(data, name, (case[1], case[2]))
        draw, _ = stored_probes(data, name)
        keys = [("c1", "input"), ("c2", "input"), ("c1", "weight"), ("c2", "weight")]
        call = 0
        wanted = {
            k: data[f"{name}/call_{k}"]
            for k in ("n_probes", "numel", "trace_mean", "grad_std", "grad_absmax", "trace_exact")
        }
        batches = len(wanted["numel"]) // len(keys)
        with twice_differentiable(net) as seen:
            for loss in losses(data, name, net)[:batches]:
                value = loss()
                grads = torch.autograd.grad(value, [seen[key] for key in keys], create_graph=True)
                for key, grad in zip(keys, grads, strict=True):
                    at, what = seen[key], f"{name} call {call}"
                    assert at.numel() == int(wanted["numel"][call]), what
                    close(grad.detach().std(), wanted["grad_std"][call], what, rtol=1e-3)
                    close(grad.detach().abs().max(), wanted["grad_absmax"][call], what, rtol=1e-3)
                    trace = hutchinson(grad, at, draw=draw, official_behaviour=True)
                    assert trace.probes == int(wanted["n_probes"][call]), what
                    close(torch.tensor(trace.mean), wanted["trace_mean"][call], what, rtol=1e-3)
                    call += 1
        assert call == len(wanted["numel"])


def test_exact_traces(data):
    """All basis vectors give the trace; our own probes give it within what their closed-form variance allows."""
    case = cases(data, r"hess/W(\d+)A(\d+)(?=/)")[0]
    name = case[0]
    net = tiny(data, name, (case[1], case[2]))
    keys = [("c1", "weight"), ("c2", "weight")]
    with twice_differentiable(net) as seen:
        losses(data, name, net)[0]()
        value = losses(data, name, net)[0]()
        for index, key in enumerate(keys):
            at = seen[key]
            (grad,) = torch.autograd.grad(value, at, create_graph=True)
            rows = [
                torch.autograd.grad(grad, at, torch.eye(at.numel())[i].view(at.shape), retain_graph=True)[0].flatten()
                for i in range(at.numel())
            ]
            hessian = torch.stack(rows).double()
            want = data[f"{name}/call_trace_exact"][2 + index]
            close(hessian.trace().float(), want, f"{name} {key}", rtol=1e-3)
            draws = 400
            variance = 2.0 * float(hessian.square().sum() - hessian.diagonal().square().sum())
            torch.manual_seed(0)
            found = hutchinson(grad, at, probes=draws, tolerance=0.0)
            assert found.probes == draws
            assert abs(found.mean - float(want)) < 5.0 * math.sqrt(variance / draws)


def test_without_the_defects_the_mean_is_over_all_batches(data):
    """The official loop divides by one less than the number of batches where a loader ends before the loop does."""
    case = cases(data, r"hess/W(\d+)A(\d+)(?=/)")[0]
    name = case[0]
    found = {}
    for official in (True, False):
        net = tiny(data, name, (case[1], case[2]), batches=3, official_behaviour=official)
        torch.manual_seed(0)
        found[official] = measure_deltas_(net, losses(data, name, net)[:3], draw=torch.ones_like)
    assert any(value > 0 for value in found[False].values())
    for key, value in found[False].items():
        assert found[True][key] == pytest.approx(value * 3 / 2, rel=1e-6)


def test_the_layers_are_quantized(data):
    case = cases(data, r"hess/W(\d+)A(\d+)(?=/)")[0]
    net = tiny(data, case[0], (case[1], case[2]))
    assert [name for name, m in net.named_modules() if isinstance(m, Quantized)] == ["c1", "c2"]
