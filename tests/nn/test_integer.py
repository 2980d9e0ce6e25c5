"""The central promise of qat_int8: evaluation, simulation and the converted model give the same integers."""

from __future__ import annotations

import copy
import io
import pickle
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gradbits as gb
from gradbits.core.errors import ArgumentError, GraphError
from gradbits.kernels.fixed_point import Multiplier
from gradbits.nn.integer import Codes, Dequantize, IntegerLayer, Quantize, Shape
from gradbits.nn.integer_model import IntegerModel
from gradbits.nn.qat import graph_forward

integers: Any = import_module("tests.nn.integers")
NAMES, batch, first, fresh, trained = (
    getattr(integers, name) for name in ("NAMES", "batch", "first", "fresh", "trained")
)
each_model = pytest.mark.parametrize("name", NAMES)
VARIANTS = [{}, {"weights": "tensor", "rounding": "double"}, {"weight_bits": 4, "activation_bits": 5}]


def outputs(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        y = model(x)
    return list(y) if isinstance(y, tuple) else [y]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@each_model
def test_evaluation_equals_simulation_equals_conversion(name, options):
    model, x = trained(name, **options), batch(9, seed=50)[0]
    evaluated = outputs(model, x)
    simulated = copy.deepcopy(model)
    forward = graph_forward(simulated)
    assert forward is not None
    forward.compute = "simulate"
    assert equal(outputs(simulated, x), evaluated)
    assert gb.convert_(model) is model
    assert isinstance(model, IntegerModel)
    assert equal(outputs(model, x), evaluated)
    assert not any(t.requires_grad for t in (*model.parameters(), *model.buffers()))


class Floats(TorchDispatchMode):
    """Counts the operations that touch floating-point tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        self.count += 1
        if any(t.is_floating_point() or t.is_complex() for t in tensors):
            self.seen.append(str(func))
        return result


@each_model
def test_no_float_between_the_ends(name):
    model, x = gb.convert_(trained(name)), batch(4)[0]
    model(x)  # what is looked up once, such as whether a kernel is exact here
    values: dict[str, Any] = {model.inputs[0]: x}
    ends = counted = 0
    for label, sources in model.wiring:
        operation = model.operations[f"{label}_"]
        with Floats() as mode:
            values[label] = operation(*(values[s] for s in sources))
        if isinstance(operation, (Quantize, Dequantize)):
            ends += 1
            assert mode.seen
        else:
            counted += mode.count
            assert not mode.seen, (label, mode.seen)
    assert ends >= 2
    assert counted > 10


@pytest.mark.parametrize("name", ["mlp", "small_cnn", "mobilenet"])
def test_training_and_inference_differ_by_one_code_at_most(name):
    """The forward of training rounds floats, inference rounds sums: the first layer's codes may part at ties."""
    model, x = trained(name), batch(16, seed=9)[0]
    forward = graph_forward(model)
    assert forward is not None
    node = next(n for n, users in forward.plan.sources.items() if forward.plan.steps[n].kind == "layer")
    with torch.no_grad():
        layer = forward.plan.steps[node]
        seen = {}
        original = forward._quantized

        def record(step, value):
            seen[step.node] = original(step, value)
            return seen[step.node]

        forward._quantized = record  # type: ignore[method-assign]
        forward._follow(forward._arguments((x,), {}))
        del forward._quantized
    converted = gb.convert_(copy.deepcopy(model))
    codes = converted.values(x)[layer.head.name]
    meaning = converted.operations[f"{layer.head.name}_"].codes
    trained_codes = torch.round(seen[node] / meaning.scale) + meaning.zero
    difference = (trained_codes - codes).abs()
    assert float(difference.max()) <= 1
    assert float(difference.mean()) < 1e-3


def test_codes_stay_legal():
    model = gb.convert_(trained("small_cnn", weight_bits=3, activation_bits=4))
    layers = [op for op in model.operations.values() if isinstance(op, IntegerLayer)]
    assert layers
    values = model.values(batch(8)[0] * 10)
    for (label, _), op in zip(model.wiring, model.operations.values(), strict=True):
        if isinstance(op, IntegerLayer):
            assert int(op.weight.abs().max()) <= 3
            if op.codes is not None:
                assert -8 <= int(values[label].min()) <= int(values[label].max()) <= 7


def test_eight_bit_weights_leave_out_minus_128():
    model = gb.convert_(trained("mlp"))
    smallest = [int(op.weight.min()) for op in model.operations.values() if isinstance(op, IntegerLayer)]
    assert smallest
    assert min(smallest) == -127


def test_the_state_is_plain_tensors_and_travels():
    model, x = gb.convert_(trained("small_cnn")), batch(3)[0]
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = gb.convert_(trained("small_cnn"))
    for t in other.buffers():
        t.zero_()
    other.load_state_dict(saved, strict=True)
    assert torch.equal(other(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert gb.convert_(model) is model


def test_batches_of_any_size_and_none():
    model = trained("small_cnn")
    converted = gb.convert_(copy.deepcopy(model))
    x = batch(7)[0]
    whole = converted(x)
    assert torch.equal(torch.cat([converted(x[:3]), converted(x[3:])]), whole)
    assert converted(x[:0]).shape == (0, 5)


def test_a_dead_channel_and_a_large_bias():
    """A channel whose weights are zero keeps its bias; a bias that int32 could not hold takes a larger step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 49, 3))
    with torch.no_grad():
        model[1].weight[0], model[1].bias[0] = 0.0, 0.75
        model[1].weight[1], model[1].bias[1] = 1e-12, 0.5
    gb.quantize_(model, "qat_int8")
    x = batch()[0]
    for _ in range(3):
        model(x)
    model.eval()
    converted = gb.convert_(copy.deepcopy(model))
    assert torch.equal(converted(x), model(x))
    name = next(name for name, op in converted.operations.items() if isinstance(op, IntegerLayer))
    op = converted.operations[name]
    codes = converted.values(x)[name[:-1]]
    for channel, value in ((0, 0.75), (1, 0.5)):
        real = (codes[:, channel].float() - op.codes.zero) * op.codes.scale
        assert float((real - value).abs().max()) <= op.codes.scale / 2 * 1.001


def test_activations_that_never_fire():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    gb.quantize_(model, "qat_int8")
    x = torch.randn(5, 3)
    model(x)
    model.eval()
    want = model(x).detach()
    assert torch.equal(gb.convert_(model)(x), want)
    assert torch.equal(gb.convert_(model)(x * 1000), want)  # the range is zero: nothing else can come out


@pytest.mark.parametrize("shape", ["linear", "conv", "depthwise"])
def test_a_layer_equals_its_definition(shape):
    """Against the sum written out with Python's integers."""
    torch.manual_seed(1)
    groups = 4 if shape == "depthwise" else 1
    w = torch.randint(-127, 128, (4, 4 // groups, 3, 3) if shape != "linear" else (4, 6), dtype=torch.int8)
    x = torch.randint(-128, 128, (2, 4, 5, 5) if shape != "linear" else (5, 6), dtype=torch.int8)
    bias, zero, codes = torch.randint(-999, 999, (4,), dtype=torch.int32), -17, Codes(0.1, 5, -128, 127)
    kind = Shape() if shape == "linear" else Shape((2, 2), ((1, 1), (1, 1)), (1, 1), groups)
    m = Multiplier.of(torch.full((4,), 0.0037, dtype=torch.float64))
    layer = IntegerLayer(w, torch.ones(4), bias, kind, zero, codes, m)
    centred = x.double() - zero
    if shape == "linear":
        sums = F.linear(centred, w.double(), bias.double())
    else:
        sums = F.conv2d(centred, w.double(), bias.double(), 2, 1, 1, groups)
    want = (torch.floor(sums.abs() * 0.0037 + 0.5) * sums.sign() + 5).clamp(-128, 127)
    assert torch.equal(layer(x).double(), want)


class Softmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).softmax(-1))


def test_what_cannot_be_converted_says_why_and_stays():
    net, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    with pytest.raises(GraphError, match="quantize_"):
        gb.convert_(net)
    gb.quantize_(net, "qat_int8")
    with pytest.raises(GraphError, match="ranges of input_1 are not known"):
        gb.convert_(net)
    net(x)
    assert gb.convert_(net)(x).shape == (3, 4)

    net = Softmax()
    gb.quantize_(net, "qat_int8")
    net(x)
    want = net.eval()(x).detach()
    with pytest.raises(GraphError, match="softmax has no integer form"):
        gb.convert_(net)
    assert torch.equal(net(x), want)
    with pytest.raises(TypeError, match="model"):
        gb.convert_("net")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.ConvTranspose2d(2, 3, 2), "transposed"),
        (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
    ],
)
def test_layers_without_an_integer_form(layer, why):
    net = nn.Sequential(layer)
    gb.quantize_(net, "qat_int8")
    x = torch.randn(2, 2, 5, 5)
    net(x).sum().backward()
    assert bool(torch.isfinite(net.eval()(x)).all())
    with pytest.raises(GraphError, match=why):
        gb.convert_(net)


def test_sums_that_could_overflow_are_refused():
    net = nn.Sequential(nn.Linear(70_000, 1))
    gb.quantize_(net, "qat_int8")
    net(torch.randn(2, 70_000))
    with pytest.raises(GraphError, match="70000 products in a sum could overflow int32"):
        gb.convert_(net)


def test_what_a_converted_model_does_not_take():
    model = gb.convert_(trained("small_cnn"))
    with pytest.raises(ArgumentError, match="got 0; the model takes input"):
        model()
    with pytest.raises(ArgumentError, match="must have 4 axes and 2 channels"):
        model(torch.randn(2, 3, 9, 9))
    with pytest.raises(ArgumentError, match="must have 4 axes and 2 channels"):
        model(torch.randn(2, 9, 9))
    linear = gb.convert_(trained("mlp"))
    with pytest.raises(ArgumentError, match="must have 162 features"):
        linear(torch.randn(2, 2, 3))


def test_averages_over_windows_and_values_added_in_place():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.relu = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.relu(self.a(x))
            y = self.b(x)
            y += x
            y = F.avg_pool2d(self.relu(y), 3, stride=2)
            return F.adaptive_avg_pool2d(y, (1, 1)).flatten(1)

    torch.manual_seed(0)
    net, x = Net(), batch()[0]
    with torch.no_grad():
        exact = net(x)
    gb.quantize_(net, "qat_int8")
    net(x)
    want = net.eval()(x).detach()
    assert float((want - exact).norm() / exact.norm()) < 0.05
    assert torch.equal(gb.convert_(net)(x), want)


def test_fresh_models_are_float():
    assert all(p.is_floating_point() for p in fresh("mlp").parameters())
