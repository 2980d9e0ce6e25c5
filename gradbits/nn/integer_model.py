"""A model of integer operations: how they are wired, and what moves their codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradbits.core.errors import ArgumentError


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
        if isinstance(self.target, str):
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        return self.target(*args, **kwargs)


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
        inputs: names of the arguments.
        operations: (name, operation, names of its inputs) in the order in which they run.
        result: what is returned, values replaced by ``Ref`` into ``names``.
        names: names of the returned values.
    """

    def __init__(
        self,
        inputs: tuple[str, ...],
        operations: list[tuple[str, nn.Module, tuple[str, ...]]],
        result: Any,
        names: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.setup(inputs, operations, result, names)

    def setup(
        self,
        inputs: tuple[str, ...],
        operations: list[tuple[str, nn.Module, tuple[str, ...]]],
        result: Any,
        names: tuple[str, ...],
    ) -> None:
        """Take the parts; separate from ``__init__`` because ``convert_`` turns an existing module into this class."""
        self.inputs, self.result, self.names = inputs, result, names
        self.wiring = [(name, sources) for name, _, sources in operations]
        self.operations = nn.ModuleDict({f"{name}_": operation for name, operation, _ in operations})

    def forward(self, *args: Any) -> Any:
        """Return what the model returned before it was converted, in float32."""
        values = self.values(*args)
        return filled(self.result, tuple(values[name] for name in self.names))

    def values(self, *args: Any) -> dict[str, Any]:
        """Return every value by the name of its operation: codes, sums, and the floats at both ends."""
        if len(args) != len(self.inputs):
            raise ArgumentError(f"args: got {len(args)}; the model takes {', '.join(self.inputs)}")
        values: dict[str, Any] = dict(zip(self.inputs, args, strict=True))
        for name, sources in self.wiring:
            values[name] = self.operations[f"{name}_"](*(values[source] for source in sources))
        return values
