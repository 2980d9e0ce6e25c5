"""Exported files in onnxruntime: the integers of ``convert_``, in one form bit for bit, in the other within bounds."""

from __future__ import annotations

import copy
import re
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradbits as gb
from gradbits.core.errors import ArgumentError, DtypeError, GradbitsError, GraphError
from gradbits.export.onnx_model import onnx_model
from gradbits.export.runtime import Runtime, float_onnx, latencies
from gradbits.nn.integer import IntegerLayer
from gradbits.nn.integer_model import IntegerModel
from gradbits.train.export_file import export_file

integers: Any = import_module("tests.nn.integers")
NAMES, batch, trained = integers.NAMES, integers.batch, integers.trained
each_model = pytest.mark.parametrize("name", NAMES)
pytestmark = pytest.mark.filterwarnings("ignore:.*onnx.*:DeprecationWarning")
VARIANTS = [{}, {"weights": "tensor", "rounding": "double"}, {"weight_bits": 4, "activation_bits": 5}]
X = batch(24, seed=70)[0]


def outputs(model: nn.Module, x: torch.Tensor) -> list[np.ndarray]:
    with torch.no_grad():
        y = model(x)
    return [t.numpy() for t in (y if isinstance(y, tuple) else (y,))]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@each_model
def test_the_integer_form_gives_the_same_bits(name, options):
    model = trained(name, **options)
    want = outputs(model, X)
    runtime = Runtime(onnx_model(gb.convert_(model), (X,), "integer").SerializeToString())
    for count in (24, 5, 1):  # the batch is free
        got = runtime(X[:count])
        assert all(np.array_equal(a, b[:count]) for a, b in zip(got, want, strict=True))


def codes_of(model: IntegerModel, form: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the codes of every layer, from the converted model and from onnxruntime."""
    proto, suffix = onnx_model(model, (X,), form), "_codes" if form == "qdq" else ""
    layers = [
        name
        for name, _ in model.wiring
        if isinstance(op := model.operations[f"{name}_"], IntegerLayer) and op.codes is not None
    ]
    kind = onnx.TensorProto.UINT8 if form == "qdq" else onnx.TensorProto.INT8
    for name in layers:
        proto.graph.output.append(onnx.helper.make_tensor_value_info(f"{name}{suffix}", kind, None))
    got = Runtime(proto.SerializeToString())(X)[len(model.names) :]
    want = model.values(X)
    moved = 128 if form == "qdq" else 0
    return {n: (want[n].numpy().astype(int), g.astype(int) - moved) for n, g in zip(layers, got, strict=True)}


@each_model
def test_every_code_of_the_integer_form(name):
    found = codes_of(gb.convert_(trained(name)), "integer")
    assert found
    for label, (want, got) in found.items():
        assert np.array_equal(want, got), label


@pytest.mark.parametrize("options", [{}, {"weights": "tensor"}, VARIANTS[2]], ids=str)
@each_model
def test_qdq_differs_by_few_codes_and_little(name, options):
    """onnxruntime rounds sums times a float32 number, halves to even: near ties it may take the other code.

    A float32 product is off by 2^-24 of a value of up to 256, so about one code in 2^15 may flip where sums are
    spread evenly: at most three of a layer's few thousand, each by one. How far a flip spreads in the layers behind is
    the network's doing, so each layer is judged from the codes that onnxruntime itself gave it.
    """
    model = gb.convert_(trained(name, **options))
    found = codes_of(model, "qdq")
    theirs: dict[str, Any] = dict(zip(model.arguments, (X,), strict=True))
    for label, sources in model.wiring:
        theirs[label] = model.operations[f"{label}_"](*(theirs[source] for source in sources))
        if label in found:
            got = torch.from_numpy(found[label][1])
            off = (theirs[label].int() - got).abs()
            assert int(off.max()) <= 1, label
            assert int(off.sum()) <= 3, label
            theirs[label] = got.to(theirs[label].dtype)


def test_the_file_is_standard_and_checked(tmp_path):
    model, path = gb.convert_(trained("small_cnn")), tmp_path / "net.onnx"
    for form, expected in (("qdq", "QuantizeLinear"), ("integer", "ConvInteger")):
        gb.export.onnx(model, (X[:2],), path, form=form, metadata={"data": "noise"})
        proto = onnx.load(path)
        onnx.checker.check_model(proto, full_check=True)
        assert {node.domain for node in proto.graph.node} == {""}
        assert expected in {node.op_type for node in proto.graph.node}
        assert {p.key: p.value for p in proto.metadata_props} == {"gradbits": form, "data": "noise"}
        assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE}
    inner = [i for i in proto.graph.initializer if i.data_type in floats and i.dims]
    assert len(inner) == 1  # of the integer form: the scales of the result, nothing in between


def test_a_model_in_training_is_exported_as_a_converted_copy(tmp_path):
    model = trained("mlp")
    want = outputs(model, X)
    gb.export.onnx(model, (X,), tmp_path / "net.onnx", form="integer")
    assert not isinstance(model, IntegerModel)
    assert np.array_equal(Runtime(str(tmp_path / "net.onnx"))(X)[0], want[0])


def test_torch_export(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 2, 3, stride=3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3))
    gb.quantize_(model, "qat_int8")
    model(X)
    gb.convert_(model)
    program = gb.export.torch_export(model, (X[:4],), tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2")
    for count in (4, 7):
        want = outputs(model, X[:count])[0]
        assert np.array_equal(outputs(program.module(), X[:count])[0], want)
        assert np.array_equal(outputs(loaded.module(), X[:count])[0], want)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [t for t in targets if "gradbits" in t]


def test_what_is_refused(tmp_path):
    model, path = trained("small_cnn"), tmp_path / "net.onnx"
    with pytest.raises(ArgumentError, match="form='fast'"):
        gb.export.onnx(model, (X,), path, form="fast")
    with pytest.raises(ArgumentError, match="args: must be a tuple"):
        gb.export.onnx(model, X, path)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="must be 1 tensors"):
        gb.export.onnx(model, (X, X), path)
    with pytest.raises(ArgumentError, match="does not take them"):
        gb.export.onnx(model, (X[:, :1],), path)
    with pytest.raises(GraphError, match="quantize_"):
        gb.export.onnx(nn.Sequential(nn.Linear(2, 2)), (torch.ones(1, 2),), path)
    assert not path.exists()


class Reshaping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(self.a_values(x))

    def a_values(self, x: torch.Tensor) -> torch.Tensor:
        """Mix the samples of a batch."""
        return torch.flatten(x.unsqueeze(-1), 0, 1).reshape(-1, 4)


def test_what_has_no_form_in_onnx_is_named(tmp_path):
    model = Reshaping()
    gb.quantize_(model, "qat_int8")
    x = torch.randn(3, 4)
    model(x)
    with pytest.raises(GraphError, match=r"flatten.*: flatten from axis 0"):
        gb.export.onnx(model, (x,), tmp_path / "net.onnx")
    assert not list(Path(tmp_path).iterdir())


def test_windows_of_averages_in_qdq(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(27, 2))
    gb.quantize_(model, "qat_int8")
    model(X)
    model.eval()
    want = outputs(model, X)[0]
    converted = gb.convert_(copy.deepcopy(model))
    assert np.array_equal(outputs(converted, X)[0], want)
    got = Runtime(onnx_model(converted, (X,), "qdq").SerializeToString())(X)[0]
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max()
    with pytest.raises(GraphError, match="form='qdq'"):
        onnx_model(converted, (X,), "integer")


def test_latencies_and_float_files():
    model = integers.fresh("mlp").eval()
    runtime = Runtime(float_onnx(model, (X,)))
    assert np.allclose(runtime(X[:3])[0], outputs(model, X[:3])[0], atol=1e-5)
    assert len(latencies([runtime, runtime], (X,), repeats=2)) == 2


def test_the_default_form_is_the_one_of_the_command_line(tmp_path):
    gb.export.onnx(gb.convert_(trained("mlp")), (X,), tmp_path / "net.onnx")
    proto = onnx.load(tmp_path / "net.onnx")
    assert {p.key: p.value for p in proto.metadata_props} == {"gradbits": "qdq"}
    assert signature(export_file).parameters["form"].default == "qdq"


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float64])
def test_example_arguments_are_float32(tmp_path, dtype):
    for form in ("integer", "qdq"):
        with pytest.raises(DtypeError, match=r"args: .* must be torch\.float32"):
            gb.export.onnx(trained("mlp"), (X.to(dtype),), tmp_path / "net.onnx", form=form)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"path": None}, "path=None"),
        ({"path": 3}, "path=3"),
        ({"metadata": {"a": 1}}, "metadata={'a': 1}: must map names to texts"),
        ({"metadata": {1: "a"}}, "metadata={1: 'a'}: must map names to texts"),
        ({"metadata": "abc"}, "metadata='abc': must map names to texts"),
    ],
)
def test_types_of_an_export(tmp_path, given, named):
    with pytest.raises(DtypeError, match=re.escape(named)):
        gb.export.onnx(trained("mlp"), (X,), **{"path": tmp_path / "net.onnx", **given})
    assert not list(tmp_path.iterdir())


def test_what_torch_export_refuses(tmp_path):
    model = gb.convert_(trained("mlp"))
    for count in (0, 1):
        with pytest.raises(ArgumentError, match=f"args: a batch of {count}; must be at least 2"):
            gb.export.torch_export(model, (X[:count],))
    with pytest.raises(DtypeError, match="path=3"):
        gb.export.torch_export(model, (X,), 3)  # type: ignore[arg-type]
    with pytest.raises(GradbitsError, match="cannot be written"):
        gb.export.torch_export(model, (X,), tmp_path)


def test_a_batch_that_a_model_fixes_has_no_exported_program():
    model = Fixed()
    gb.quantize_(model, "qat_int8")
    x = torch.randn(6, 4)
    model(x)
    with pytest.raises(GraphError, match=r"torch\.export cannot follow"):
        gb.export.torch_export(model, (x,))


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.b(self.a(x).view(6, 4))
        return y


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.pool, self.head = nn.Conv1d(2, 4, 3), nn.MaxPool1d(2), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        """Return logits; ``scale`` is not used."""
        y = F.max_pool1d(self.pool(F.pad(F.relu(self.a(x)), (1, 1))), 2, stride=1)
        return self.head(y.view(y.size(0), -1))


@pytest.mark.parametrize("form", ["integer", "qdq"])
def test_views_and_maxima_as_written_by_hand(form):
    model, x = ByHand(), torch.randn(6, 2, 9)
    gb.quantize_(model, "qat_int8")
    model(x)
    want = outputs(model.eval(), x)[0]
    got = Runtime(onnx_model(gb.convert_(model), (x,), form).SerializeToString())(x)[0]
    assert np.allclose(got, want, rtol=0, atol=0 if form == "integer" else 1e-2)


def test_maxima_that_round_sizes_up_are_refused(tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 3, 2), Rounding(), nn.Flatten(), nn.Linear(48, 2))
    gb.quantize_(model, "qat_int8")
    model(X[..., :8])
    with pytest.raises(GraphError, match="max_pool2d returns indices or rounds sizes up"):
        gb.export.onnx(model, (X[..., :8],), tmp_path / "net.onnx")


class Rounding(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return maxima of windows, the last of them smaller."""
        return F.max_pool2d(x, 2, ceil_mode=True)
