"""A model file that ``gradbits train`` wrote, as an ONNX file: written, and checked against what it promises."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gradbits.core.errors import ArgumentError
from gradbits.core.files import write_atomically
from gradbits.export import torch_export
from gradbits.export.onnx_model import onnx_model
from gradbits.export.runtime import Runtime, float_onnx, latencies
from gradbits.nn import IntegerModel, convert_, dequantize_
from gradbits.nn.qat import graph_forward
from gradbits.train.evaluate_file import Opened, open_network

FORMS = ("qdq", "integer", "pt2")
BATCH = 32  # samples of the batch that latencies are measured on


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What one form of a model does on the test set.

    Args:
        name: ``fp32``, ``qdq``, ``integer``, or ``convert_``.
        nbytes: size of the file.
        accuracy: share of right answers, or None where the test is not one of classes.
        differing: integers of the result (sums of the last layer, or codes) that differ from those of the trained model
            in evaluation, None for fp32.
        largest: largest difference of an output in floats.
        answers: samples whose most likely class differs.
        ms_one, ms_batch: median latency of one sample and of ``BATCH`` samples, in milliseconds; None: not measured.
    """

    name: str
    nbytes: int
    accuracy: float | None
    differing: int | None
    largest: float
    answers: int
    ms_one: float | None
    ms_batch: float | None


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was exported.

    Args:
        path: the file.
        form: of the file.
        samples: test samples of the check.
        checked: results by form; empty where nothing was checked.
    """

    path: Path
    form: str
    samples: int
    checked: tuple[Checked, ...]


def export_file(
    path: str | Path,
    out: str | Path | None = None,
    *,
    form: str = "qdq",
    check: bool = False,
    threads: int = 1,
    **where: Any,
) -> Exported:
    """Write a model file that was trained with ``qat_int8`` for another runtime.

    Args:
        path: as for ``evaluate_file``; the recipe is the one that the file names.
        out: the file to make; None: beside ``path``.
        form: ``"qdq"`` or ``"integer"`` (see ``gradbits.export.onnx``), or ``"pt2"`` for ``torch.export``.
        check: whether to run the test set through onnxruntime, and to measure sizes and latencies.
        threads: of onnxruntime.
        where: ``data``, ``data_dir``, ``limit``, ``model``, ``model_set`` and ``recipe`` as for ``evaluate_file``.

    Raises:
        ArgumentError: a file that was not trained for integers, an output that is the input, and as in
            ``evaluate_file``.
        GraphError: the model cannot compute in integers.
    """
    path = Path(path)
    if form not in FORMS:
        raise ArgumentError(f"form={form!r}: must be one of {', '.join(map(repr, FORMS))}")
    target = path.with_suffix(".pt2" if form == "pt2" else ".onnx") if out is None else Path(out)
    _refuse_input(path, target)
    opened = open_network(path, device="cpu", **where)
    model = opened.network.model.eval()
    if graph_forward(model) is None:
        raise ArgumentError(
            f"{path}: was trained with {opened.network.entry.label!r}, which is no recipe for integer inference; train "
            "with qat_int8, or give --recipe qat_int8 with a checkpoint that holds its ranges"
        )
    integer = convert_(copy.deepcopy(model))
    batch = next(iter(opened.task.test_batches())).inputs[:BATCH]
    told = {key: opened.metadata[key] for key in ("data", "model", "recipe", "seed") if key in opened.metadata}
    forms = {kind: onnx_model(integer, (batch,), kind, told).SerializeToString() for kind in ("qdq", "integer")}
    if form == "pt2":
        torch_export(integer, (batch,), target)
    else:
        write_atomically(target, lambda file: file.write(forms[form]))
    checked = _check(opened, integer, forms, batch, threads) if check else ()
    samples = sum(len(b.targets) for b in opened.task.test_batches()) if check else 0
    return Exported(path=target, form=form, samples=samples, checked=checked)


def _refuse_input(path: Path, target: Path) -> None:
    """Refuse to write over the model itself, which may have another name through a link."""
    if path.exists() and target.exists() and os.path.samefile(path, target):
        raise ArgumentError(f"out={str(target)!r}: is the model {str(path)!r} itself; must be another file")


def output_scale(model: IntegerModel) -> torch.Tensor:
    """Return what one step of the integers of a model's first output is worth."""
    scale = model.get_buffer(f"operations.{model.names[0]}_.scale")
    return scale


def _check(
    opened: Opened, integer: IntegerModel, forms: dict[str, bytes], batch: torch.Tensor, threads: int
) -> tuple[Checked, ...]:
    model = opened.network.model
    plain = copy.deepcopy(model)
    dequantize_(plain)
    plain.eval()
    files = {"fp32": float_onnx(plain, (batch,)), **forms}
    runtimes = {name: Runtime(data, threads) for name, data in files.items()}
    ones, batches = (latencies(list(runtimes.values()), (batch[:count],)) for count in (1, len(batch)))
    names = (*runtimes, "convert_")
    right, differing, answers, largest = ({name: 0.0 for name in names} for _ in range(4))
    count, scale = 0, output_scale(integer)
    with torch.no_grad():
        for inputs, targets in opened.task.test_batches():
            want = model(inputs)
            count += len(targets)
            for name in names:
                got = integer(inputs) if name not in runtimes else torch.from_numpy(runtimes[name](inputs)[0])
                right[name] += int((got.argmax(-1).flatten() == targets).sum())
                differing[name] += int((torch.round(got / scale) != torch.round(want / scale)).sum())
                answers[name] += int((got.argmax(-1) != want.argmax(-1)).sum())
                largest[name] = max(largest[name], float((got - want).abs().max()))
    held = sum(t.numel() * t.element_size() for t in integer.buffers())
    results = []
    for index, name in enumerate(names):
        ran = name in runtimes
        results.append(
            Checked(
                name=name,
                nbytes=len(files[name]) if ran else held,
                accuracy=right[name] / count if opened.task.metric == "test_accuracy" else None,
                differing=None if name == "fp32" else int(differing[name]),
                largest=largest[name],
                answers=int(answers[name]),
                ms_one=ones[index] if ran else None,
                ms_batch=batches[index] if ran else None,
            )
        )
    return tuple(results)
