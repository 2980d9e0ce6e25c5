"""The QDQ form of an ONNX model: float operators between QuantizeLinear and DequantizeLinear, which runtimes fuse."""

from __future__ import annotations

import torch

from gradbits.core.errors import GraphError
from gradbits.export.onnx_moves import add_move
from gradbits.export.onnx_writer import Writer
from gradbits.nn.integer import (
    Clamp,
    Codes,
    Dequantize,
    IntegerCat,
    IntegerLayer,
    IntegerMean,
    IntegerSum,
    Quantize,
)
from gradbits.nn.integer_model import Apply

OFFSET = 128  # codes travel as uint8, which runtimes multiply with int8 weights the fastest


class QDQ:
    """Adds operations one after the other and remembers what each value's codes mean.

    Args:
        writer: gets the nodes.
    """

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.codes: dict[str, Codes] = {}  # by the name of a dequantized value

    def add(self, name: str, operation: torch.nn.Module, inputs: list[str], values: list[torch.Tensor]) -> str:
        """Add one operation of an ``IntegerModel``; return the name of its result in floats.

        Args:
            name: of the operation.
            operation: what it does.
            inputs: names of its inputs in floats.
            values: what they are for an example, for their numbers of axes.
        """
        w = self.writer
        x, dims = inputs[0], values[0].dim()
        if isinstance(operation, Quantize):
            return self._grid(name, x, operation.codes)
        if isinstance(operation, Dequantize):
            return w.node("Identity", x, name=name)
        if isinstance(operation, IntegerLayer):
            return self._layer(name, operation, x, dims)
        if isinstance(operation, IntegerSum):
            return self._grid(name, w.node("Add", *inputs, name=f"{name}_added"), operation.codes)
        if isinstance(operation, IntegerCat):
            joined = w.node("Concat", *inputs, name=f"{name}_joined", axis=operation.axis % dims)
            first: IntegerSum = operation.parts[0]  # type: ignore[assignment]
            return self._grid(name, joined, first.codes)
        if isinstance(operation, IntegerMean):
            return self._grid(name, self._mean(name, operation, x, dims), operation.codes)
        if isinstance(operation, Clamp):
            codes = self.codes[x]
            return self._grid(name, x, Codes(codes.scale, codes.zero, operation.low, operation.high))
        if isinstance(operation, Apply):
            moved = add_move(w, f"{name}_moved", operation, x, dims, w.constant(0.0, "float32"))
            return self._grid(name, moved, self.codes[x]) if x in self.codes else moved
        raise GraphError(f"{name}: {type(operation).__name__} has no ONNX form")

    def _grid(self, name: str, x: str, codes: Codes) -> str:
        """Put a value on its grid: clip where the codes are fewer than 256, quantize, dequantize."""
        w = self.writer
        if (codes.low, codes.high) != (-OFFSET, OFFSET - 1):
            low, high = (w.constant((n - codes.zero) * codes.scale, "float32") for n in (codes.low, codes.high))
            x = w.node("Clip", x, low, high, name=f"{name}_clipped")
        scale, zero = w.constant(codes.scale, "float32"), w.constant(codes.zero + OFFSET, "uint8")
        quantized = w.node("QuantizeLinear", x, scale, zero, name=f"{name}_codes")
        result = w.node("DequantizeLinear", quantized, scale, zero, name=name)
        self.codes[result] = codes
        return result

    def _layer(self, name: str, layer: IntegerLayer, x: str, dims: int) -> str:
        w, s = self.writer, layer.shape
        sums = layer.steps * self.codes[x].scale
        weight = w.constant(layer.weight, name=f"{name}_weight")
        scale = w.constant(layer.steps.float(), name=f"{name}_scale")
        weight = w.node("DequantizeLinear", weight, scale, name=f"{name}_real_weight", axis=0)
        bias_scale = w.constant(sums.float(), name=f"{name}_bias_scale")
        bias = w.node("DequantizeLinear", w.constant(layer.bias, name=f"{name}_bias"), bias_scale, axis=0)
        result = name if layer.codes is None and layer.least is None else f"{name}_real"
        if s.spatial:
            y = w.node(
                "Conv",
                x,
                weight,
                bias,
                name=result,
                strides=list(s.stride),
                dilations=list(s.dilation),
                group=s.groups,
                pads=[p[0] for p in s.padding] + [p[1] for p in s.padding],
            )
        elif dims == 2:
            y = w.node("Gemm", x, weight, bias, name=result, transB=1)
        else:
            y = w.node("Add", w.node("MatMul", x, w.node("Transpose", weight, perm=[1, 0])), bias, name=result)
        if layer.codes is not None:
            return self._grid(name, y, layer.codes)
        shape = (-1, *(1,) * s.spatial)
        for op, bound in (("Max", layer.least), ("Min", layer.most)):
            if bound is not None:
                y = w.node(op, y, w.constant((bound * sums).float().view(shape), name=f"{name}_bound"))
        return y

    def _mean(self, name: str, mean: IntegerMean, x: str, dims: int) -> str:
        w = self.writer
        if mean.axes is None:
            return w.node(
                "AveragePool", x, name=f"{name}_mean", kernel_shape=list(mean.window), strides=list(mean.stride)
            )
        axes = sorted(axis % dims for axis in mean.axes)
        if mean.keep and axes == list(range(2, dims)):
            return w.node("GlobalAveragePool", x, name=f"{name}_mean")
        return w.node("ReduceMean", x, name=f"{name}_mean", axes=axes, keepdims=int(mean.keep))
