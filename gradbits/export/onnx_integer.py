"""The integer form of an ONNX model: the operations of ``IntegerModel`` in standard integer operators, bit for bit."""

from __future__ import annotations

import numpy as np
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


def add_integer(
    writer: Writer, name: str, operation: torch.nn.Module, inputs: list[str], values: list[torch.Tensor]
) -> str:
    """Add the nodes of one operation in integers; return the name of its result.

    Args:
        writer: gets them.
        name: of the operation.
        operation: of an ``IntegerModel``.
        inputs: names of its inputs.
        values: what the inputs are for an example, for their numbers of axes.
    """
    if isinstance(operation, Quantize):
        return _quantize(writer, name, operation, inputs[0])
    if isinstance(operation, Dequantize):
        return _dequantize(writer, name, operation, inputs[0])
    if isinstance(operation, IntegerLayer):
        return _layer(writer, name, operation, inputs[0], values[0].dim())
    if isinstance(operation, IntegerSum):
        return _sum(writer, name, operation, inputs)
    if isinstance(operation, IntegerCat):
        pairs = enumerate(zip(operation.parts, inputs, strict=True))
        parts = [_sum(writer, f"{name}_{i}", part, [x]) for i, (part, x) in pairs]  # type: ignore[arg-type]
        return writer.node("Concat", *parts, name=name, axis=operation.axis % values[0].dim())
    if isinstance(operation, IntegerMean):
        return _mean(writer, name, operation, inputs[0], values[0])
    if isinstance(operation, Clamp):
        low, high = (writer.constant(n, "int8") for n in (operation.low, operation.high))
        return writer.node("Clip", inputs[0], low, high, name=name)
    if isinstance(operation, Apply):
        zero = writer.constant(int(operation.kwargs.get("value", 0) or 0), "int8")
        return add_move(writer, name, operation, inputs[0], values[0].dim(), zero)
    raise GraphError(f"{name}: {type(operation).__name__} has no ONNX form")


def _quantize(writer: Writer, name: str, operation: Quantize, x: str) -> str:
    codes = operation.codes
    scaled = writer.node("Mul", x, writer.constant(operation.inverse), name=f"{name}_scaled")
    rounded = writer.node("Round", scaled, name=f"{name}_rounded")
    moved = writer.node("Add", rounded, writer.constant(codes.zero, "float32"), name=f"{name}_moved")
    low, high = (writer.constant(n, "float32") for n in (codes.low, codes.high))
    return writer.cast(writer.node("Clip", moved, low, high, name=f"{name}_clipped"), "INT8", name)


def _dequantize(writer: Writer, name: str, operation: Dequantize, x: str) -> str:
    wide = writer.cast(x, "INT32", f"{name}_int32")
    if operation.zero:
        wide = writer.node("Sub", wide, writer.constant(operation.zero, "int32"), name=f"{name}_centred")
    scale = writer.constant(operation.scale, name=f"{name}_scale")
    return writer.node("Mul", writer.cast(wide, "FLOAT", f"{name}_float"), scale, name=name)


def _layer(writer: Writer, name: str, layer: IntegerLayer, x: str, dims: int) -> str:
    zero, s = writer.constant(layer.zero, "int8"), layer.shape
    # onnxruntime multiplies int8 with uint8 several times faster than with int8
    weights, middle = (layer.weight.to(torch.int16) + 128).to(torch.uint8), writer.constant(128, "uint8")
    if s.spatial:
        sums = writer.node(
            "ConvInteger",
            x,
            writer.constant(weights, name=f"{name}_weight"),
            zero,
            middle,
            name=f"{name}_products",
            strides=list(s.stride),
            dilations=list(s.dilation),
            group=s.groups,
            pads=[p[0] for p in s.padding] + [p[1] for p in s.padding],
        )
        shape = (-1, *(1,) * s.spatial)
    else:
        weight = writer.constant(weights.t(), name=f"{name}_weight")
        sums = writer.node("MatMulInteger", x, weight, zero, middle, name=f"{name}_products")
        shape = (-1,)
    bias = writer.constant(layer.bias.view(shape), name=f"{name}_bias")
    sums = writer.node("Add", sums, bias, name=f"{name}_sums" if layer.codes or layer.least is not None else name)
    if layer.codes is None:
        for op, bound in (("Max", layer.least), ("Min", layer.most)):
            if bound is not None:
                sums = writer.node(op, sums, writer.constant(bound.view(shape), name=f"{name}_bound"))
        return sums
    m0, shift = layer.m0.view(shape).cpu().numpy(), layer.shift.view(shape).cpu().numpy()
    wide = writer.cast(sums, "INT64", f"{name}_wide")
    if layer.rounding == "single":
        product = writer.node("Mul", wide, writer.constant(m0, name=f"{name}_m0"))
        # behind a ReLU what is below zero becomes zero, however it was rounded
        rectified = layer.codes.low == layer.codes.zero
        scaled = _rounding_divide(writer, name, product, 1 << (31 + shift), rectified)
    else:
        scaled = _double_rounding(writer, name, wide, m0, shift)
    return _codes(writer, name, scaled, layer.codes)


def _rounding_divide(writer: Writer, name: str, x: str, divisor: np.ndarray | int, positive: bool = False) -> str:
    """Add the division of int64 ``x`` by an even number, halves away from zero: ONNX drops the rest towards zero."""
    divisor = np.asarray(divisor, dtype=np.int64)
    half = writer.constant(divisor // 2, name=f"{name}_half")
    half = half if positive else writer.node("Mul", writer.node("Sign", x), half)
    return writer.node("Div", writer.node("Add", x, half), writer.constant(divisor, name=f"{name}_divisor"))


def _double_rounding(writer: Writer, name: str, x: str, m0: np.ndarray, shift: np.ndarray) -> str:
    if (shift < 0).any():
        raised = writer.node("Mul", x, writer.constant(1 << np.maximum(-shift, 0), name=f"{name}_left"))
        x = writer.node("Clip", raised, writer.constant(-(1 << 31), "int64"), writer.constant((1 << 31) - 1, "int64"))
    product = writer.node("Mul", x, writer.constant(m0, name=f"{name}_m0"))
    negative = writer.node("Less", product, writer.constant(0, "int64"))
    nudge = writer.node(
        "Where", negative, writer.constant(1 - (1 << 30), "int64"), writer.constant(1 << 30, "int64")
    )
    high = writer.node("Div", writer.node("Add", product, nudge), writer.constant(1 << 31, "int64"))
    high = writer.node("Min", high, writer.constant((1 << 31) - 1, "int64"))
    return _rounding_divide(writer, name, high, 1 << np.maximum(shift, 0))


def _codes(writer: Writer, name: str, scaled: str, codes: Codes) -> str:
    moved = writer.node("Add", scaled, writer.constant(codes.zero, "int64"), name=f"{name}_moved")
    low, high = (writer.constant(n, "int64") for n in (codes.low, codes.high))
    return writer.cast(writer.node("Clip", moved, low, high, name=f"{name}_clipped"), "INT8", name)


def _sum(writer: Writer, name: str, operation: IntegerSum, inputs: list[str]) -> str:
    total = ""
    for index, (x, zero, factor) in enumerate(zip(inputs, operation.zeros, operation.factors, strict=True)):
        wide = writer.cast(x, "INT64", f"{name}_wide{index}")
        centred = writer.node("Sub", wide, writer.constant(zero, "int64"))
        part = writer.node("Mul", centred, writer.constant(factor, "int64"))
        total = part if not total else writer.node("Add", total, part, name=f"{name}_total")
    scaled = _rounding_divide(writer, name, total, 1 << operation.shift) if operation.shift else total
    return _codes(writer, name, scaled, operation.codes)


def _mean(writer: Writer, name: str, operation: IntegerMean, x: str, value: torch.Tensor) -> str:
    if operation.axes is None:
        raise GraphError(f"{name}: average pooling by windows has no integer form in ONNX; use form='qdq'")
    axes = [axis % value.dim() for axis in operation.axes]
    wide = writer.cast(x, "INT32", f"{name}_wide")
    centred = writer.node("Sub", wide, writer.constant(operation.zero, "int32"))
    added = writer.node("ReduceSum", centred, writer.constant(axes, "int64"), keepdims=int(operation.keep))
    total = writer.cast(added, "INT64", f"{name}_total")
    shape = writer.node("Shape", x, name=f"{name}_shape")
    sizes = writer.node("Gather", shape, writer.constant(axes, "int64"))
    count = writer.node("ReduceProd", sizes, keepdims=0)
    m0, shift = operation.multiplier
    divisor = writer.node("Mul", count, writer.constant(1 << (31 + shift), "int64"))
    product = writer.node("Mul", total, writer.constant(m0, "int64"))
    half = writer.node("Div", divisor, writer.constant(2, "int64"))
    nudged = writer.node("Add", product, writer.node("Mul", writer.node("Sign", product), half))
    return _codes(writer, name, writer.node("Div", nudged, divisor), operation.codes)
