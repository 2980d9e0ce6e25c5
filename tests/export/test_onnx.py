"""Exported files in onnxruntime: the integers of ``convert_``, in one form bit for bit, in the other within bounds."""

from __future__ import annotations

import copy
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import gradbits as gb
from gradbits.core.errors import ArgumentError, GraphError
from gradbits.export.onnx_model import onnx_model
from gradbits.export.runtime import Runtime, float_onnx, latencies
from gradbits.nn.integer import IntegerLayer
from gradbits.nn.integer_model import IntegerModel

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
    spread evenly; flips are carried on to the layers behind. The bounds leave room for that and no more.
    """
    model = gb.convert_(trained(name, **options))
    for label, (want, got) in codes_of(model, "qdq").items():
        assert np.abs(want - got).max() <= 1, label
        assert np.mean(want != got) <= 2e-3, label


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
