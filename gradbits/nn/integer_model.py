"""A model of integer operations: how they are wired, and what moves their codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gradbits.core.errors import ArgumentError
from gradbits.nn.integer_state import Numbered


@dataclass(frozen=True)
class Ref:
    """Stands for an operation's input in its arguments."""

    index: int


class Apply(nn.Module):
    """What moves codes or picks among them: reshaping, slicing, padding, maxima.

    Args:
        target: a function, the name of a tensor's method, or a module without parameters.
        args, kwargs: its arguments; ``Ref`` stands for an input.
    """

    def __init__(self, target: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.target, self.args, self.kwargs = target, args, kwargs

    def forward(self, *values: Any) -> Any:
        """Return what the target returns."""
        args, kwargs = filled(self.args, values), filled(self.kwargs, values)
        if isinstance(self.target, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)):
            return _max_pool(self.target, values[0])
        if isinstance(self.target, str):
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        return self.target(*args, **kwargs)


class Pad(Numbered, Apply):
    """Padding with the code of zero."""

    numbers = ("zero",)

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], zero: int) -> None:
        super().__init__(F.pad, args, {**kwargs, "value": zero})

    @property
    def zero(self) -> int:
        """The code of zero."""
        return int(self.kwargs["value"])

    @zero.setter
    def zero(self, value: int) -> None:
        self.kwargs = {**self.kwargs, "value": value}


def _max_pool(pool: nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d, x: torch.Tensor) -> torch.Tensor:
    """Return the maxima of windows of codes."""
    spatial = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}[type(pool)]
    numbers = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    each = [(n,) * spatial if isinstance(n, int) else tuple(n) for n in numbers]
    if spatial == 1:
        rows = [(neutral, n[0]) for neutral, n in zip((1, 1, 0, 1), each, strict=True)]
        return _maxima(x.unsqueeze(-2), rows).squeeze(-2)
    planes = _maxima(x, [n[-2:] for n in each])
    if spatial == 2:
        return planes
    columns = [(n[0], neutral) for neutral, n in zip((1, 1, 0, 1), each, strict=True)]
    return _maxima(planes.flatten(-2), columns).unflatten(-1, planes.shape[-2:])


def _maxima(x: torch.Tensor, numbers: list[Any]) -> torch.Tensor:
    """Return the maxima of windows over the last two axes.

    For int8, PyTorch has no pooling of other dimensions, and counts positions in int8 where channels come last.
    """
    found: torch.Tensor = F.max_pool2d(x.flatten(0, -3).contiguous().unsqueeze(1), *numbers)
    return found.reshape(*x.shape[:-2], *found.shape[-2:])


def filled(value: Any, values: tuple[Any, ...]) -> Any:
    """Return arguments with their references replaced by the inputs."""
    if isinstance(value, Ref):
        return values[value.index]
    if isinstance(value, dict):
        return {key: filled(item, values) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(filled(item, values) for item in value)
    if isinstance(value, slice):
        return slice(*(filled(item, values) for item in (value.start, value.stop, value.step)))
    return value


class IntegerModel(nn.Module):
    """A model that computes in integers from its first quantization to its last dequantization.

    ``gradbits.convert_`` makes one of a model that was trained with ``qat_int8``.

    Args:
        inputs: names of the arguments that are used.
        operations: (name, operation, names of its inputs) in the order in which they run.
        result: what is returned, values replaced by ``Ref`` into ``names``.
        names: names of the returned values.
        signature: names of all arguments in their order, and the defaults of those that have one.
    """

    def __init__(
        self,
        inputs: tuple[str, ...],
        operations: list[tuple[str, nn.Module, tuple[str, ...]]],
        result: Any,
        names: tuple[str, ...],
        signature: tuple[tuple[str, ...], dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.setup(inputs, operations, result, names, signature)

    def setup(
        self,
        inputs: tuple[str, ...],
        operations: list[tuple[str, nn.Module, tuple[str, ...]]],
        result: Any,
        names: tuple[str, ...],
        signature: tuple[tuple[str, ...], dict[str, Any]] | None = None,
    ) -> None:
        """Take the parts; separate from ``__init__`` because ``convert_`` turns an existing module into this class."""
        self.inputs, self.result, self.names = inputs, result, names
        self.arguments, self.defaults = signature or (inputs, {})
        self.wiring = [(name, sources) for name, _, sources in operations]
        self.operations = nn.ModuleDict({f"{name}_": operation for name, operation, _ in operations})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returned before it was converted, in float32.

        Raises:
            ArgumentError: arguments that the model does not take.
        """
        values = self.values(*args, **kwargs)
        return filled(self.result, tuple(values[name] for name in self.names))

    def values(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return every value by the name of its operation: codes, sums, and the floats at both ends.

        Raises:
            ArgumentError: arguments that the model does not take.
        """
        values: dict[str, Any] = dict(zip(self.arguments, args, strict=False))
        twice = [name for name in kwargs if name in values]
        values = {**self.defaults, **values, **kwargs}
        if len(args) > len(self.arguments) or twice or set(values) != set(self.arguments):
            given = f" and {', '.join(kwargs)}" if kwargs else ""
            raise ArgumentError(f"args: got {len(args)}{given}; the model takes {', '.join(self.arguments)}")
        for name, sources in self.wiring:
            values[name] = self.operations[f"{name}_"](*(values[source] for source in sources))
        return values
