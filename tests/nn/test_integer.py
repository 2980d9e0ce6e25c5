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
from gradbits.nn import qat
from gradbits.nn.integer import Codes, Dequantize, IntegerLayer, Quantize, Shape
from gradbits.nn.integer_model import Apply, IntegerModel, Ref
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


class Pooled(nn.Module):
    """Shapes and maxima as they are written by hand."""

    def __init__(self, pool: Any, features: int, dims: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](2, 4, 3)
        self.pool, self.head = pool, nn.Linear(features, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        y = self.pool(F.relu(self.a(x)))
        return self.head(y.view(y.size(0), -1))


@pytest.mark.parametrize(
    ("pool", "features", "dims"),
    [
        (nn.Identity(), 196, 2),
        (lambda x: F.max_pool2d(x, 2), 36, 2),
        (lambda x: F.max_pool2d(x, kernel_size=3, stride=(2, 1), padding=1), 112, 2),
        (nn.MaxPool1d(2), 12, 1),
        (nn.MaxPool1d(3, stride=2, padding=1, dilation=2), 12, 1),
        (lambda x: F.max_pool1d(x, 2), 12, 1),
        (lambda x: torch.max_pool1d(x, 2, 1), 24, 1),
        (lambda x: F.max_pool3d(x, 2), 108, 3),
        (nn.MaxPool3d((2, 3, 2), stride=(1, 2, 3), padding=1), 384, 3),
    ],
)
def test_views_and_maxima(pool, features, dims):
    model = Pooled(pool, features, dims)
    plain, x = copy.deepcopy(model), torch.randn(6, 2, *(9,) * dims)
    gb.quantize_(model, "qat_int8")
    model(x)
    want = outputs(model.eval(), x)
    exact = plain(x).detach()
    assert float((want[0] - exact).norm() / exact.norm()) < 0.05
    assert equal(outputs(gb.convert_(model), x), want)


@pytest.mark.parametrize("pool", [nn.MaxPool1d(3, 2, 1), nn.MaxPool2d(3, 2, 1, 2), nn.MaxPool3d((2, 3, 2), 2, 1)])
def test_maxima_of_codes_of_any_size_and_memory_order(pool):
    spatial = [nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d].index(type(pool)) + 1
    last = torch.randint(-128, 128, (2, *((200,), (13, 17), (5, 9, 11))[spatial - 1], 3), dtype=torch.int8)
    for x in (last.movedim(-1, 1), last.movedim(-1, 1).contiguous(), last.movedim(-1, 1)[0], last[:0].movedim(-1, 1)):
        got = Apply(pool, (Ref(0),), {})(x)
        assert got.dtype == torch.int8
        assert torch.equal(got.float(), pool(x.float()))


def test_maxima_that_round_sizes_up_are_refused_in_both_forms():
    for pool in (nn.MaxPool2d(2, ceil_mode=True), lambda x: F.max_pool2d(x, 2, ceil_mode=True)):
        model = Pooled(pool, 64)
        gb.quantize_(model, "qat_int8")
        model(batch()[0])
        with pytest.raises(GraphError, match="rounds sizes up"):
            gb.convert_(model)


def test_a_state_brings_its_zero_points_limits_and_factors():
    """A model whose ranges lay elsewhere gives the results of the one whose state it loads."""
    found = []
    for factor in (1.0, 3.0):
        model = fresh("everything")
        gb.quantize_(model, "qat_int8")
        model(batch()[0] * factor + factor)
        found.append(gb.convert_(model))
    a, b = found
    x = batch(3)[0]
    assert not equal(outputs(a, x), outputs(b, x))
    file = io.BytesIO()
    torch.save(a.state_dict(), file)
    file.seek(0)
    b.load_state_dict(torch.load(file, weights_only=True))
    assert equal(outputs(a, x), outputs(b, x))
    other = a.state_dict()
    key = next(key for key in other if key.endswith("_extra_state"))
    other[key] = torch.zeros(9)
    with pytest.raises(ArgumentError, match="converted in the same way"):
        b.load_state_dict(other)


class Options(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor, scale: Any = None) -> torch.Tensor:
        """Return a sum; ``scale`` is not used."""
        return self.a(x) + self.b(y)


def test_defaults_and_keywords_are_those_of_the_model():
    model, x, y = Options(), torch.randn(5, 4), torch.randn(5, 2)
    gb.quantize_(model, "qat_int8")
    model(x, y)
    with torch.no_grad():
        want = model.eval()(x, y)
        assert torch.equal(model(y=y, x=x), want)
    converted = gb.convert_(model)
    for got in (converted(x, y), converted(x, y=y), converted(scale=1.0, y=y, x=x), converted(x, y, None)):
        assert torch.equal(got, want)
    for args, kwargs in (((x,), {}), ((x, y), {"x": x}), ((x, y), {"z": 1}), ((x, y, 1, 2), {})):
        with pytest.raises(ArgumentError, match="the model takes x, y, scale"):
            converted(*args, **kwargs)


def test_evaluation_is_exact_with_gradients_under_autocast_and_in_containers():
    model, x = trained("everything"), batch(4)[0]
    want = outputs(model, x)
    assert equal([t.detach() for t in model(x)], want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        assert equal(outputs(model, x), want)
    assert equal([t.detach() for t in y], want)
    sum(t.sum() for t in y).backward()
    assert bool(torch.isfinite(model.head.weight.grad).all())


def test_the_integers_of_evaluation_are_built_once_until_something_changes(monkeypatch):
    calls = []
    monkeypatch.setattr(qat, "build", lambda forward, make=qat.build: calls.append(0) or make(forward))
    if qat.fingerprint(nn.Linear(1, 1)) is None:
        pytest.skip("needs the native digest")
    model, x = trained("small_cnn"), batch(4)[0]
    first_result = outputs(model, x)
    assert equal(outputs(model, x), first_result)
    assert len(calls) == 1
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    weight = next(m for m in model.modules() if isinstance(m, nn.Linear)).weight
    forward = graph_forward(model)
    assert forward is not None
    changes = [
        lambda: weight.data.mul_(0.5),
        lambda: weight.detach().numpy().fill(0.25),
        lambda: norm.running_mean.add_(1.0),
        lambda: model.load_state_dict(fresh("small_cnn").state_dict()),
        lambda: [t.mul_(2.0) for name, t in forward.states.entries().items() if name != "steps"],
    ]
    for count, change in enumerate(changes, start=2):
        change()
        got = outputs(model, x)
        assert len(calls) == count
        assert equal(got, outputs(gb.convert_(copy.deepcopy(model)), x))
