"""What the optimizers that talk to the other ranks share: parameters by name, and states of all ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from gradbits.core.errors import ArgumentError


def named_parameters(optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """Return the parameters of an optimizer by the names that it was given, or by their numbers.

    Raises:
        ArgumentError: there is none.
    """
    found: dict[str, nn.Parameter] = {}
    for group in optimizer.param_groups:
        names = group.get("param_names") or [f"parameter{len(found) + i}" for i in range(len(group["params"]))]
        found.update(zip(names, group["params"], strict=True))
    if not found:
        raise ArgumentError("params: must hold a parameter at least")
    return found


def as_stored(optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> None:
    """Give the optimizer's state the stored tensors in their own dtype: PyTorch casts them to the parameter's."""
    numbers = [number for group in stored["param_groups"] for number in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for key, value in stored["state"].get(number, {}).items():
            if isinstance(value, torch.Tensor):
                optimizer.state[parameter][key] = value.to(parameter.device).clone()


def check_shapes(optimizer: torch.optim.Optimizer, stored: dict[str, Any], keys: Iterable[str]) -> None:
    """Refuse a stored state whose tensors have other shapes than the parameters.

    Raises:
        ArgumentError: names the first.
    """
    numbers = [number for group in stored["param_groups"] for number in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if len(numbers) != len(parameters):
        raise ArgumentError(f"state_dict: has {len(numbers)} parameters; this optimizer has {len(parameters)}")
    for number, parameter in zip(numbers, parameters, strict=True):
        for key in keys:
            value = stored["state"].get(number, {}).get(key)
            if value is not None and value.shape != parameter.shape:
                found, wanted = list(value.shape), list(parameter.shape)
                raise ArgumentError(f"state_dict: {key} of parameter {number} has shape {found}, not {wanted}")
