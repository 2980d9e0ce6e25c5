"""What an exported file costs and whether it keeps its promise, measured with onnxruntime."""

from __future__ import annotations

import io
import statistics
import time
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from gradbits.core.errors import MissingDependencyError


class Runtime:
    """An ONNX model in onnxruntime on the processor.

    Args:
        model: serialized model, or the path of a file.
        threads: threads of one operator.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
    """

    def __init__(self, model: bytes | str, threads: int = 1) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingDependencyError("onnxruntime: is not installed; pip install 'gradbits[export]'") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.inputs = [value.name for value in self.session.get_inputs()]

    def __call__(self, *args: torch.Tensor) -> list[np.ndarray]:
        """Return the outputs for tensors in the order of the model's inputs."""
        feed = {name: np.ascontiguousarray(a.numpy()) for name, a in zip(self.inputs, args, strict=True)}
        result: list[np.ndarray] = self.session.run(None, feed)
        return result


def latencies(runtimes: Sequence[Runtime], args: tuple[torch.Tensor, ...], repeats: int = 15) -> list[float]:
    """Return the median milliseconds of one run of each; they take turns, after two rounds of warm-up."""
    times: list[list[float]] = [[] for _ in runtimes]
    for turn in range(repeats + 2):
        for index in range(len(runtimes)):
            which = (turn + index) % len(runtimes)
            started = time.perf_counter()
            runtimes[which](*args)
            if turn >= 2:
                times[which].append(1000 * (time.perf_counter() - started))
    return [statistics.median(each) for each in times]


def float_onnx(model: nn.Module, args: tuple[torch.Tensor, ...]) -> bytes:
    """Return a float model as ONNX, written by PyTorch's own exporter; the batch may have any size."""
    file: Any = io.BytesIO()
    names = [f"input{index}" for index in range(len(args))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, args, file, dynamo=False, input_names=names, dynamic_axes={name: {0: "batch"} for name in names}
        )
    written: bytes = file.getvalue()
    return written
