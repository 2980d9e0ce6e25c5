"""Quantization-aware training of whole models: where it quantizes, its phases, its states, what it refuses."""

from __future__ import annotations

import copy
import warnings
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradbits as gb
from gradbits.core.errors import ArgumentError, GraphError
from gradbits.nn.graph import plan_of
from gradbits.nn.qat import graph_forward, state_at
from gradbits.quantizers.grids import Affine
from gradbits.quantizers.quantizer import Quantizer
from gradbits.quantizers.ranges import EMA, MinMax

integers: Any = import_module("tests.nn.integers")
Everything, batch, first, fresh = (getattr(integers, name) for name in ("Everything", "batch", "first", "fresh"))


def small(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 49, 5))
    gb.quantize_(net, gb.recipe("qat_int8", **options))
    return net


def forward_of(net: nn.Module) -> Any:
    found = graph_forward(net)
    assert found is not None
    return found


def ranges(net: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in forward_of(net).states.entries().items()}


def test_what_is_one_step():
    steps = plan_of(_quantized(Everything())).steps
    found = {step.head.name: (step.kind, step.norm, step.bounds) for step in steps.values()}
    assert found["stem_0"] == ("layer", "stem.1", (0.0, 6.0))
    assert found["left_0"] == ("layer", "left.1", (None, None))
    assert found["right"] == ("layer", None, (0.0, None))
    assert found["add"] == ("add", None, (0.0, None))
    kinds = [step.kind for step in steps.values()]
    assert kinds.count("cat") == kinds.count("mean") == 1
    assert "float" not in kinds


def _quantized(net: nn.Module) -> nn.Module:
    gb.quantize_(net, "qat_int8")
    return net


def test_the_model_keeps_its_modules_and_its_float_checkpoint_loads():
    plain, net = fresh("small_cnn"), _quantized(fresh("small_cnn"))
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert len(net) == len(plain)
    assert not any(net.load_state_dict(plain.state_dict(), strict=True))


def test_the_delay_is_float_and_follows_the_ranges():
    net = small(delay=2, weight_bits=8)
    plain = copy.deepcopy(net)
    gb.dequantize_(plain)
    with torch.no_grad():  # weights on the grid already: activations alone decide
        for i in (0, 4):
            signs = torch.randint(-1, 2, net[i].weight.shape, generator=torch.Generator().manual_seed(i))
            for module in (net[i], plain[i]):
                module.weight.copy_(signs)
    net[1].eval()
    plain[1].eval()
    x = batch()[0]
    before = ranges(net)
    for _ in range(2):
        got, want = net(x), plain(x)
        assert torch.allclose(got, want, atol=1e-4)
    inner = F.relu(plain[1](plain[0](x)))
    after = ranges(net)
    assert bool(torch.isnan(before["_2__high"]))
    assert torch.allclose(after["_2__high"], inner.max(), atol=1e-3)
    assert not torch.allclose(net(x), plain(x), atol=1e-4)  # the third step quantizes


def test_in_the_delay_activations_are_what_they_were():
    """Bit for bit, while their ranges move."""
    net = small(delay=1)
    x = batch()[0]
    forward = forward_of(net)
    values = []
    original = forward._quantized
    forward._quantized = lambda step, value: values.append((value, original(step, value))) or values[-1][1]
    net(x)
    assert len(values) == 2
    assert all(a is b for a, b in values)
    net(x)
    assert not any(torch.equal(a, b) for a, b in values[2:])
    del forward._quantized


def test_ranges_stand_still_in_evaluation_and_for_bad_batches():
    net, x = small(), batch()[0]
    net(x)
    before = ranges(net)
    net.eval()(x * 9)
    bad = x.clone()
    bad[0, 0, 0, 0] = float("nan")
    after_eval = ranges(net)
    assert all(torch.equal(before[k], v) for k, v in after_eval.items())
    statistics = copy.deepcopy(net[1].state_dict())
    assert not bool(torch.isfinite(net.train()(bad)).all())
    after = ranges(net)
    assert all(torch.equal(before[k], v) for k, v in after.items() if k != "steps")
    assert all(torch.equal(statistics[k], v) for k, v in net[1].state_dict().items())
    assert not bool(torch.isfinite(net.eval()(bad)).all())


def test_frozen_batch_norms():
    net, x = small(freeze=1), batch()[0]
    net(x)
    statistics = copy.deepcopy(net[1].state_dict())
    y = net(x * 3)
    assert all(torch.equal(statistics[k], v) for k, v in net[1].state_dict().items())
    y.sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    unfrozen = small()
    unfrozen(x)
    unfrozen(x * 3)
    assert not torch.equal(unfrozen[1].running_var, net[1].running_var)


def test_phases_count_across_a_checkpoint():
    net, x = small(delay=2), batch()[0]
    net(x)
    other = small(delay=2)
    other.load_state_dict(net.state_dict())
    net.zero_grad()
    assert torch.equal(net(x), other(x))
    assert torch.equal(net(x), other(x))
    assert int(forward_of(other).states.steps) == 3


def test_again_keeps_the_ranges_and_other_bits_do_not():
    net, x = small(), batch()[0]
    net(x)
    before = ranges(net)
    gb.quantize_(net, "qat_int8")
    assert all(torch.equal(before[k], v) for k, v in ranges(net).items())
    gb.quantize_(net, gb.recipe("qat_int8", activation_bits=4))
    assert bool(torch.isnan(ranges(net)["_2__high"]))
    gb.dequantize_(net)
    assert graph_forward(net) is None
    assert not [k for k in net.state_dict() if "quantizers" in k]


def test_one_layer_alone_and_a_layer_in_float():
    layer = nn.Linear(4, 3)
    gb.quantize_(layer, "qat_int8")
    layer(torch.randn(5, 4)).sum().backward()
    assert "quantizers.output_input_low" in layer.state_dict()

    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    gb.quantize_(net, {"2": None, "*": "qat_int8"})
    net(torch.randn(5, 4)).sum().backward()
    with pytest.raises(GraphError, match=r"'2' \(Linear\) has no integer form"):
        gb.convert_(net)


def test_two_precisions_in_one_model():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    gb.quantize_(net, {"0": "qat_int8", "*": gb.recipe("qat_int8", weight_bits=3, activation_bits=3)})
    x = torch.randn(50, 4)
    net(x)
    want = net.eval()(x).detach()
    converted = gb.convert_(net)
    assert torch.equal(converted(x), want)
    assert len(torch.unique(converted.values(x)["_0"])) <= 8


def test_a_part_that_was_changed_alone_is_noticed():
    net, x = small(), batch()[0]
    gb.quantize_(net[4], "int8_dynamic")
    with pytest.raises(GraphError, match="layer '4' does not follow the graph"):
        net(x)
    gb.quantize_(net, "qat_int8")
    assert net(x).shape == (12, 5)


def test_a_layer_that_is_used_twice_trains_but_does_not_convert():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.inner(torch.tanh(self.inner(x))))

    net = _quantized(Twice())
    net(torch.randn(5, 4)).sum().backward()
    assert "inner.quantizers.output_input_low" in net.state_dict()
    with pytest.raises(GraphError, match="'inner' is used more than once"):
        gb.convert_(net)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) if x.sum() > 0 else x


def test_what_cannot_be_traced_is_refused_before_anything_changes():
    net = Branching()
    with pytest.raises(GraphError, match=r"cannot be traced: .*call quantize_ on the part"):
        gb.quantize_(net, "qat_int8")
    assert type(net.a) is nn.Linear
    assert "forward" not in net.__dict__


def test_arguments_go_by_name_and_default():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
            return self.a(x) * scale

    torch.manual_seed(0)
    net, x = _quantized(Net()), torch.randn(3, 4)
    assert torch.equal(net(x=x), net(x, 2.0))
    with pytest.raises(GraphError, match="takes x, scale"):
        net(x, width=3)
    with pytest.raises(GraphError, match="'x' is missing"):
        net(scale=1.0)


def test_gradients_in_evaluation_are_those_of_the_floats():
    net, x = small(), batch()[0]
    net(x)
    net.eval()
    x.requires_grad_()
    y = net(x)
    assert torch.equal(y, net(x).detach())
    with torch.no_grad():
        assert torch.equal(net(x), y)
    y.sum().backward()
    assert bool(torch.isfinite(x.grad).all())
    assert float(x.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    "options",
    [
        {"weight_bits": 1},
        {"activation_bits": 9},
        {"activation_bits": True},
        {"decay": 1.0},
        {"decay": -0.1},
        {"delay": -1},
        {"freeze": -1},
        {"weights": "row"},
        {"rounding": "up"},
    ],
)
def test_illegal_options(options):
    (value,) = options.values()
    with pytest.raises(ArgumentError, match=str(value)):
        gb.recipe("qat_int8", **options)


def test_overrides_reach_every_part():
    recipe = gb.recipe("qat_int8").with_overrides({"weight.bits": "4", "input.bits": "5", "qat.delay": "7"})
    assert (recipe.output.weight.bits, recipe.output.input.bits, recipe.qat.delay) == (4, 5, 7)
    assert gb.Recipe.from_json(recipe.to_json()) == recipe


@given(
    st.floats(-1e3, 1e3, width=32), st.floats(-1e3, 1e3, width=32), st.integers(2, 8), st.floats(-1e3, 1e3, width=32)
)
def test_zero_is_exact_and_quantizing_twice_changes_nothing(a, b, bits, x):
    low, high = torch.tensor([min(a, b)]), torch.tensor([max(a, b)])
    state = {"low": low, "high": high}
    q = Quantizer(grid=Affine(bits=bits, zero="nudge"), range=EMA(of=MinMax()))
    values = torch.tensor([0.0, x])
    once = q.quantize(values, state=state, update=False)
    y = once.dequantize()
    assert float(y[0]) == 0.0
    again = q.quantize(y, state=state, update=False)
    assert torch.equal(again.codes, once.codes)
    inside = min(float(low), 0.0) <= x <= max(float(high), 0.0)
    if inside:  # nudging shifts the range by up to half a step, so its ends may clip by as much
        assert abs(float(y[1]) - x) <= float(once.scale) * 1.001
    assert len(torch.unique(q.quantize(torch.linspace(-2e3, 2e3, 999), state=state, update=False).codes)) <= 1 << bits


def test_moving_averages():
    """A constant input leaves them where they are; after a jump they move towards it, step by step."""
    net, x = small(decay=0.9), batch()[0]
    for _ in range(3):
        net(x)
    states = forward_of(net).states
    low = state_at(states, "input_1")["low"].clone()
    assert torch.allclose(low, x.min())
    seen = []
    for _ in range(4):
        net(x * 2)
        seen.append(float(state_at(states, "input_1")["low"]))
    want = [float(x.min()) * (2 - 0.9 ** (i + 1)) for i in range(4)]
    assert seen == pytest.approx(want, rel=1e-5)


def test_no_warning_on_the_way():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = _quantized(Everything())
        first(net(batch()[0])).sum().backward()
