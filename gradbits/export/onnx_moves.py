"""What moves values without computing, as ONNX nodes: the same for codes and for floats."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import nn

from gradbits.core.errors import GraphError
from gradbits.export.onnx_writer import Writer
from gradbits.nn.integer_model import Apply, Ref

LAST = (1 << 63) - 1
MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


def add_move(writer: Writer, name: str, operation: Apply, x: str, dims: int, pad_value: str) -> str:
    """Add the nodes of an operation that moves values; return the name of the result.

    Args:
        writer: gets them.
        name: of the operation.
        operation: what is done.
        x: the value.
        dims: axes of the value.
        pad_value: name of a constant, what padding adds.

    Raises:
        GraphError: it has no form in ONNX here.
    """
    target, args = operation.target, operation.args
    if isinstance(target, nn.Module):
        return _module(writer, name, target, x, dims)
    key = target if isinstance(target, str) else str(getattr(target, "__name__", target))
    rest, kwargs = list(args[1:]), dict(operation.kwargs)
    if target is operator.getitem:
        return _slice(writer, name, x, rest[0], dims)
    if target is F.pad:
        return _pad(writer, name, x, rest[0] if rest else kwargs["pad"], dims, pad_value)
    if key.startswith("max_pool"):
        names = ("kernel_size", "stride", "padding", "dilation")
        given = {**dict(zip(names, rest, strict=False)), **kwargs}
        pool = MAX_POOLS[int(key[-2]) - 1]
        return _module(writer, name, pool(**{k: v for k, v in given.items() if k in names}), x, dims)
    handler = HANDLERS.get(key)
    if handler is None:
        raise GraphError(f"{name}: {key} has no ONNX form here; use reshape, flatten, permute or slices")
    return handler(writer, name, x, rest, kwargs, dims)


def _module(writer: Writer, name: str, module: nn.Module, x: str, dims: int) -> str:
    if isinstance(module, nn.Flatten):
        return _flatten(writer, name, x, [module.start_dim, module.end_dim], {}, dims)
    if isinstance(module, MAX_POOLS):
        spatial = MAX_POOLS.index(type(module)) + 1

        def each(value: Any) -> list[int]:
            return [value] * spatial if isinstance(value, int) else list(value)

        stride = module.kernel_size if module.stride is None else module.stride
        pads = each(module.padding)
        return writer.node(
            "MaxPool",
            x,
            name=name,
            kernel_shape=each(module.kernel_size),
            strides=each(stride),
            pads=pads + pads,
            dilations=each(module.dilation),
        )
    return writer.node("Identity", x, name=name)  # dropout does nothing in inference


def _numbers(values: list[Any], kwargs: dict[str, Any], *names: str) -> list[Any]:
    """Return positional and keyword arguments in one list; sizes may come as one list."""
    found = [*values, *(kwargs[name] for name in names if name in kwargs)]
    return list(found[0]) if len(found) == 1 and isinstance(found[0], (list, tuple)) else found


def _reshape(writer: Writer, name: str, x: str, rest: list[Any], kwargs: dict[str, Any], dims: int) -> str:
    sizes = _numbers(rest, kwargs, "shape")
    if not sizes or not (isinstance(sizes[0], Ref) or sizes[0] == -1) or any(isinstance(n, Ref) for n in sizes[1:]):
        raise GraphError(f"{name}: reshape{tuple(sizes)} must keep the batch: x.size(0) or -1 first, then numbers")
    whole = [0 if isinstance(sizes[0], Ref) else -1, *sizes[1:]]
    return writer.node("Reshape", x, writer.constant(whole, "int64"), name=name)


def _flatten(writer: Writer, name: str, x: str, rest: list[Any], kwargs: dict[str, Any], dims: int) -> str:
    start = rest[0] if rest else kwargs.get("start_dim", 0)
    end = rest[1] if len(rest) > 1 else kwargs.get("end_dim", -1)
    start, end = start % dims, end % dims
    if start == 0:
        raise GraphError(f"{name}: flatten from axis 0 would mix the samples of a batch; start at axis 1")
    sizes = [0] * start + [-1] if end == dims - 1 else None
    if sizes is None:
        raise GraphError(f"{name}: flatten must go to the last axis")
    return writer.node("Reshape", x, writer.constant(sizes, "int64"), name=name)


def _permute(writer: Writer, name: str, x: str, rest: list[Any], kwargs: dict[str, Any], dims: int) -> str:
    order = [axis % dims for axis in _numbers(rest, kwargs, "dims")]
    return writer.node("Transpose", x, name=name, perm=order)


def _transpose(writer: Writer, name: str, x: str, rest: list[Any], kwargs: dict[str, Any], dims: int) -> str:
    a, b = (axis % dims for axis in _numbers(rest, kwargs, "dim0", "dim1"))
    order = list(range(dims))
    order[a], order[b] = b, a
    return writer.node("Transpose", x, name=name, perm=order)


def _squeeze(writer: Writer, name: str, x: str, rest: list[Any], kwargs: dict[str, Any], dims: int) -> str:
    axes = _numbers(rest, kwargs, "dim")
    if not axes:
        raise GraphError(f"{name}: squeeze must name its axes")
    return writer.node("Squeeze", x, writer.constant([axis % dims for axis in axes], "int64"), name=name)


def _unsqueeze(writer: Writer, name: str, x: str, rest: list[Any], kwargs: dict[str, Any], dims: int) -> str:
    (axis,) = _numbers(rest, kwargs, "dim")
    return writer.node("Unsqueeze", x, writer.constant([axis % (dims + 1)], "int64"), name=name)


def _identity(writer: Writer, name: str, x: str, rest: list[Any], kwargs: dict[str, Any], dims: int) -> str:
    return writer.node("Identity", x, name=name)


HANDLERS: dict[str, Callable[..., str]] = {
    "view": _reshape,
    "reshape": _reshape,
    "flatten": _flatten,
    "permute": _permute,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "contiguous": _identity,
    "dropout": _identity,
}


def _slice(writer: Writer, name: str, x: str, index: Any, dims: int) -> str:
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in parts:
        where = parts.index(Ellipsis)
        parts[where : where + 1] = [slice(None)] * (dims - len(parts) + 1)
    if any(part is None or isinstance(part, Ref) for part in parts):
        raise GraphError(f"{name}: an index must be made of numbers and slices")
    drop = [axis for axis, part in enumerate(parts) if isinstance(part, int)]
    cuts = []
    for axis, part in enumerate(parts):
        if isinstance(part, int):
            cuts.append((part, part + 1 if part != -1 else LAST, axis, 1))
        elif part != slice(None):
            cuts.append((part.start or 0, LAST if part.stop is None else part.stop, axis, part.step or 1))
    if not cuts:
        return writer.node("Identity", x, name=name)
    starts, ends, axes, steps = (writer.constant(list(column), "int64") for column in zip(*cuts, strict=True))
    if not drop:
        return writer.node("Slice", x, starts, ends, axes, steps, name=name)
    cut = writer.node("Slice", x, starts, ends, axes, steps, name=f"{name}_cut")
    return writer.node("Squeeze", cut, writer.constant(drop, "int64"), name=name)


def _pad(writer: Writer, name: str, x: str, pads: list[int], dims: int, value: str) -> str:
    low, high = [0] * dims, [0] * dims
    for index in range(len(pads) // 2):  # the last axis comes first
        low[dims - 1 - index], high[dims - 1 - index] = pads[2 * index], pads[2 * index + 1]
    return writer.node("Pad", x, writer.constant(low + high, "int64"), value, name=name)
