"""Building an ONNX graph node by node."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gradbits.core.errors import MissingDependencyError

OPSET = 17


def onnx_package() -> Any:
    """Return the package ``onnx``.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingDependencyError("onnx: is not installed; pip install 'gradbits[export]'") from error
    return onnx


class Writer:
    """Collects nodes and constants; every value has one name."""

    def __init__(self) -> None:
        self.onnx = onnx_package()
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self._names: set[str] = set()

    def fresh(self, wanted: str) -> str:
        """Return a name that nothing else has."""
        name, count = wanted, 1
        while name in self._names:
            name, count = f"{wanted}_{count}", count + 1
        self._names.add(name)
        return name

    def constant(self, value: torch.Tensor | np.ndarray | float | list[int], dtype: Any = None, name: str = "c") -> str:
        """Return the name of a constant; equal numbers share one."""
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        array = np.ascontiguousarray(array if dtype is None else array.astype(dtype)).reshape(array.shape)
        if array.size <= 8:
            key = f"{array.dtype}_{'x'.join(map(str, array.shape))}_{'_'.join(map(str, array.ravel().tolist()))}"
            if key not in self.constants:
                self.constants[key] = self.onnx.numpy_helper.from_array(array, key)
                self._names.add(key)
            return key
        name = self.fresh(name)
        self.constants[name] = self.onnx.numpy_helper.from_array(array, name)
        return name

    def node(self, op: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """Add a node with one output; return the output's name."""
        output = self.fresh(name or f"{inputs[0]}_{op.lower()}" if inputs else op.lower())
        self.nodes.append(self.onnx.helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def cast(self, x: str, dtype: str, name: str | None = None) -> str:
        """Return ``x`` in a dtype of ONNX, as ``"INT64"``."""
        return self.node("Cast", x, name=name, to=getattr(self.onnx.TensorProto, dtype))

    def model(self, inputs: list[Any], outputs: list[Any], metadata: dict[str, str]) -> Any:
        """Return the finished model, checked.

        Args:
            inputs, outputs: value infos.
            metadata: texts by name.
        """
        helper = self.onnx.helper
        graph = helper.make_graph(self.nodes, "gradbits", inputs, outputs, list(self.constants.values()))
        model = helper.make_model(graph, producer_name="gradbits", opset_imports=[helper.make_opsetid("", OPSET)])
        model.ir_version = 8  # what opset 17 came with: older runtimes read it
        helper.set_model_props(model, metadata)
        self.onnx.checker.check_model(model, full_check=True)
        return model

    def info(self, name: str, tensor: torch.Tensor) -> Any:
        """Return the description of a model's input or output; the first axis is the batch, of any size."""
        kinds = {torch.float32: "FLOAT", torch.float64: "DOUBLE", torch.int64: "INT64", torch.int32: "INT32"}
        kind = getattr(self.onnx.TensorProto, kinds.get(tensor.dtype, "FLOAT"))
        shape: list[Any] = list(tensor.shape)
        if shape:
            shape[0] = "batch"
        return self.onnx.helper.make_tensor_value_info(name, kind, shape)
