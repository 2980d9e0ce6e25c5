"""``export.onnx``: an integer model as an ONNX file of standard operators."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradbits.core.checks import check_choice, check_instance, check_module
from gradbits.core.errors import ArgumentError, DtypeError, GraphError
from gradbits.core.files import write_atomically
from gradbits.export.onnx_integer import add_integer
from gradbits.export.onnx_qdq import QDQ
from gradbits.export.onnx_writer import Writer
from gradbits.nn.integer_convert import convert_
from gradbits.nn.integer_model import IntegerModel, Ref
from gradbits.nn.qat import graph_forward

FORMS = ("integer", "qdq")


def onnx(
    model: nn.Module,
    args: tuple[torch.Tensor, ...],
    path: str | Path,
    *,
    form: str = "qdq",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a model that was trained with ``qat_int8`` as an ONNX file; the batch may have any size.

    Args:
        model: converted by ``convert_``, or in training (a converted copy is written then).
        args: example arguments; their first axis is the batch.
        path: the file; it appears whole or not at all.
        form: ``"qdq"`` puts QuantizeLinear and DequantizeLinear around float operators, the form that runtimes turn
            into their own int8 kernels; they round sums in their own way, so single codes may differ by one.
            ``"integer"`` computes what ``convert_`` computes, with ConvInteger, MatMulInteger and int64 arithmetic:
            the same integers, bit for bit.
        metadata: texts to store in the file.

    Raises:
        MissingDependencyError: ``onnx`` is not installed (``pip install 'gradbits[export]'``).
        GraphError: the model cannot compute in integers, or a step has no form in ONNX.
        ArgumentError: an unknown form, or arguments that the model does not take.
        DtypeError: arguments, a path or metadata of a wrong type.
        GradbitsError: the file cannot be written.

    >>> import tempfile, gradbits as gb
    >>> net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(16, 4)
    >>> _ = gb.quantize_(net, "qat_int8")
    >>> _, net = net(x), gb.convert_(net)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     gb.export.onnx(net, (x,), f"{folder}/net.onnx")
    ...     len((Path(folder) / "net.onnx").read_bytes()) > 100
    True
    """
    check_module(model)
    check_choice(form, "form", FORMS)
    check_instance(path, "path", str, Path)
    _check_metadata(metadata)
    data = onnx_model(as_integer(model), args, form, metadata).SerializeToString()
    write_atomically(Path(path), lambda file: file.write(data))


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, Mapping):
        raise DtypeError(f"metadata={metadata!r}: must map names to texts")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise DtypeError(f"metadata={{{key!r}: {value!r}}}: must map names to texts")


def as_integer(model: nn.Module) -> IntegerModel:
    """Return an integer model: ``model`` itself, or a converted copy."""
    if isinstance(model, IntegerModel):
        return model
    return convert_(model if graph_forward(model) is None else copy.deepcopy(model))


def example(model: IntegerModel, args: Any) -> dict[str, Any]:
    """Return every value of a model for example arguments.

    Raises:
        ArgumentError: they are not what the model takes.
    """
    if not isinstance(args, tuple) or not all(isinstance(a, torch.Tensor) for a in args):
        raise ArgumentError(f"args: must be a tuple of tensors, not {type(args).__name__}")
    if len(args) != len(model.inputs) or any(a.dim() == 0 for a in args):
        raise ArgumentError(f"args: must be {len(model.inputs)} tensors with a batch axis ({', '.join(model.inputs)})")
    try:
        with torch.no_grad():
            return model.values(*args)
    except (RuntimeError, IndexError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArgumentError(f"args: the model does not take them: {reason}") from error


def onnx_model(
    model: IntegerModel, args: tuple[torch.Tensor, ...], form: str, metadata: Mapping[str, str] | None = None
) -> Any:
    """Return the ``onnx.ModelProto`` of an integer model, checked."""
    values = example(model, args)
    for name in model.inputs:
        if values[name].dtype != torch.float32:  # the constants that meet them are float32, and ONNX converts nothing
            raise DtypeError(f"args: {name} has dtype {values[name].dtype}; must be torch.float32")
    writer = Writer()
    qdq = QDQ(writer)
    inputs = [writer.info(writer.fresh(name), values[name]) for name in model.inputs]
    names = {name: name for name in model.inputs}
    for name, sources in model.wiring:
        if not isinstance(values[name], torch.Tensor):  # a size: the nodes that need it ask for it themselves
            continue
        operation = model.operations[f"{name}_"]
        given = [s for s in sources if isinstance(values[s], torch.Tensor)]
        known = [names[s] for s in given]
        tensors = [values[s] for s in given]
        if form == "qdq":
            names[name] = qdq.add(name, operation, known, tensors)
        else:
            names[name] = add_integer(writer, name, operation, known, tensors)
    outputs = []
    for index, name in enumerate(model.names):
        label = writer.fresh("output" if len(model.names) == 1 else f"output{index}")
        writer.nodes.append(writer.onnx.helper.make_node("Identity", [names[name]], [label], name=label))
        outputs.append(writer.info(label, values[name]))
    if not _is_flat(model.result):
        raise GraphError("model: returns nested values; an ONNX graph has a flat list of outputs")
    return writer.model(inputs, outputs, {"gradbits": form, **dict(metadata or {})})


def _is_flat(result: Any) -> bool:
    parts = result.values() if isinstance(result, dict) else result if isinstance(result, (tuple, list)) else [result]
    return all(isinstance(part, Ref) for part in parts)
