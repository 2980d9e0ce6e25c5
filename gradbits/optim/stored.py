"""Stored states of the optimizers that talk to the other ranks: checked whole before anything of them is taken."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gradbits.core.checks import check_integer
from gradbits.core.errors import ArgumentError, CorruptDataError, DtypeError, GradbitsError
from gradbits.wire.layout import Slot

COUNTS = ("step", "skipped", "sent", "plain")  # of "wire"
Shapes = Callable[[nn.Parameter], Mapping[str, torch.Size]]


def as_stored(optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> None:
    """Give the optimizer's state the stored tensors in their own dtype: PyTorch casts them to the parameter's."""
    numbers = [number for group in stored["param_groups"] for number in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for key, value in stored["state"].get(number, {}).items():
            if isinstance(value, torch.Tensor):
                optimizer.state[parameter][key] = value.to(parameter.device).clone()


def check_wire(optimizer: torch.optim.Optimizer, stored: Any, name: str) -> tuple[int, int]:
    """Return the rank, and the number of ranks, that a stored state is of.

    Args:
        optimizer: that is to take it.
        stored: the state.
        name: of it, for the message.

    Raises:
        DtypeError: no dict.
        CorruptDataError: a dict of another kind.
    """
    legal = f"must be what state_dict() of {type(optimizer).__name__} returned"
    if not isinstance(stored, Mapping):
        raise DtypeError(f"{name}={reprlib.repr(stored)}: {legal}, a dict")
    for key, kind in (("state", Mapping), ("param_groups", Sequence), ("wire", Mapping)):
        if not isinstance(stored.get(key), kind):
            found = f"has {key!r}={reprlib.repr(stored[key])}" if key in stored else f"has no {key!r}"
            raise CorruptDataError(f"{name}: {found}; {legal}")
    wire = stored["wire"]
    try:
        for key in COUNTS:
            check_integer(wire.get(key), key, 0)
        world = check_integer(wire.get("world"), "world", 1)
        return check_integer(wire.get("rank"), "rank", 0, world - 1), world
    except GradbitsError as error:
        raise CorruptDataError(f"{name}: wire: {error}; {legal}") from error


def check_stored(
    optimizer: torch.optim.Optimizer,
    trained: Mapping[str, nn.Parameter],
    stored: Mapping[str, Any],
    shapes: Shapes,
    check_group: Callable[[Mapping[str, Any]], None],
    name: str,
) -> None:
    """Refuse a stored state that is not one of this optimizer.

    Args:
        optimizer: that is to take it.
        trained: its parameters that require a gradient.
        stored: the state; ``check_wire`` has seen it.
        shapes: returns the shapes of a parameter's stored tensors by their names.
        check_group: refuses options of a group that are not legal; reads them all.
        name: of the state, for the message.

    Raises:
        ArgumentError: the state of other parameters; names the first.
        CorruptDataError: it lacks something, or holds something that is not legal.
    """
    for group in stored["param_groups"]:
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), Sequence):
            raise CorruptDataError(f"{name}: param_groups holds {reprlib.repr(group)}, which is no group")
        try:
            check_group(group)
        except KeyError as error:
            raise CorruptDataError(f"{name}: a group has no {error}; is it of another optimizer?") from error
        except GradbitsError as error:
            raise CorruptDataError(f"{name}: {error}") from error
    found = [len(group["params"]) for group in stored["param_groups"]]
    wanted = [len(group["params"]) for group in optimizer.param_groups]
    if found != wanted:
        raise ArgumentError(f"{name}: has {found} parameters in its groups; this optimizer has {wanted}")
    known = {id(p) for p in trained.values()}
    numbers = [number for group in stored["param_groups"] for number in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        if id(parameter) in known:
            _check_tensors(stored["state"].get(number), shapes(parameter), f"{name}: parameter {number}")


def check_ranks(states: Any) -> list[Any]:
    """Return the states of all ranks as a list.

    Raises:
        ArgumentError, DtypeError: there is none, or no list of them.
    """
    legal = "must be the list of what state_dict() returned on every rank"
    if isinstance(states, (str, bytes)) or not isinstance(states, Sequence):
        raise DtypeError(f"states={reprlib.repr(states)}: {legal}")
    if not states:
        raise ArgumentError(f"states={states!r}: is empty; {legal}")
    return list(states)


def merge_parts(parts: Sequence[Mapping[str, torch.Tensor]], slot: Slot, rank: int) -> dict[str, torch.Tensor]:
    """Return the state that a rank of another number of ranks takes of a parameter of ``QuantizedAdam``.

    Args:
        parts: the old ranks' states of it, in their order.
        slot: its place among the new ranks.
        rank: the new one.
    """
    merged = {key: torch.stack([part[key] for part in parts]).mean(0) for key in ("m", "v", "e")}
    whole = torch.cat([part["x"] for part in parts])[: slot.numel]
    merged["x"] = torch.zeros(slot.chunk)
    own = whole[rank * slot.chunk :][: slot.chunk]
    merged["x"][: len(own)] = own
    return merged


def _check_tensors(entry: Any, shapes: Mapping[str, torch.Size], name: str) -> None:
    for key, shape in shapes.items():
        value = entry.get(key) if isinstance(entry, Mapping) else None
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            found = value.dtype if isinstance(value, torch.Tensor) else reprlib.repr(value)
            raise CorruptDataError(f"{name}: {key!r} is {found}; must be a float32 tensor of shape {list(shape)}")
        if value.shape != shape:
            raise ArgumentError(f"{name}: {key!r} has shape {list(value.shape)}, not {list(shape)}")
