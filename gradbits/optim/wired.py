"""What the optimizers that talk to the other ranks share: their parameters, gradients, and what all ranks agree on."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from gradbits.core.checks import FLOAT_DTYPES
from gradbits.core.errors import ArgumentError, DtypeError, GradbitsError, UnsupportedError
from gradbits.wire.transport import Transport

LEGAL = "must be parameters, (name, parameter) pairs, or groups of them (dicts with 'params')"


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """What all ranks know of the gradients of a step that is made.

    Args:
        silent: names of the parameters that have no gradient on any rank; these wait.
        inverse: what this rank's gradients are multiplied with, 1 / scale of its GradScaler.
    """

    silent: frozenset[str]
    inverse: float


def check_params(params: Any) -> list[Any]:
    """Return what an optimizer is to train as a list.

    Raises:
        ArgumentError, DtypeError: it is empty, or something else; says what is legal.
    """
    wrong_kind = isinstance(params, (str, bytes, torch.Tensor, Mapping))
    if wrong_kind or not isinstance(params, Iterable):
        raise DtypeError(f"params={reprlib.repr(params)}: {LEGAL}")
    found = list(params)
    if not found:
        raise ArgumentError(f"params={found}: is empty; {LEGAL}")
    return found


def add_group(add: Callable[[dict[str, Any]], None], group: Any) -> None:
    """Call PyTorch's ``add_param_group`` with a group that can be one.

    Raises:
        ArgumentError, DtypeError: it cannot; says what is legal.
    """
    if not isinstance(group, dict) or "params" not in group:
        raise DtypeError(f"params: {reprlib.repr(group)} is no group; {LEGAL}")
    params = group["params"]
    items = [params] if isinstance(params, torch.Tensor) else check_params(params)
    for item in items:
        pair = isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)
        if not isinstance(item[1] if pair else item, torch.Tensor):
            raise DtypeError(f"params: holds {reprlib.repr(item)}; {LEGAL}")
    try:
        add({**group, "params": items})
    except GradbitsError:
        raise
    except (TypeError, ValueError) as error:  # not a leaf, in two groups, with and without names
        raise ArgumentError(f"params: {error}; {LEGAL}") from error


def named_parameters(optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient by the names that the optimizer was given, or by their numbers.

    Raises:
        ArgumentError, DtypeError: there is none, two have one name, or one is not of real numbers.
    """
    found: dict[str, nn.Parameter] = {}
    count = 0
    for group in optimizer.param_groups:
        names = group.get("param_names") or [f"parameter{count + i}" for i in range(len(group["params"]))]
        count += len(names)
        for name, parameter in zip(names, group["params"], strict=True):
            if not parameter.requires_grad:
                continue
            if name in found:
                raise ArgumentError(f"params: two parameters are named {name!r}; names must differ")
            if parameter.dtype not in FLOAT_DTYPES:
                legal = ", ".join(map(str, FLOAT_DTYPES))
                raise DtypeError(f"params: {name!r} has dtype {parameter.dtype}; must be one of {legal}")
            found[name] = parameter
    if not found:
        raise ArgumentError("params: must hold a parameter at least that requires a gradient")
    return found


@torch.no_grad()
def broadcast_parameters(parameters: Mapping[str, nn.Parameter], transport: Transport) -> None:
    """Give every rank the parameters of rank 0, in one collective per dtype; not counted as traffic of the training.

    Number and shapes are equal: ``CommState.setup`` has looked.

    Raises:
        ArgumentError: a parameter has another dtype on another rank; all ranks raise it.
    """
    if transport.world == 1:
        return
    sent = transport.traffic.sent
    agreed = transport.gather_values(torch.tensor([FLOAT_DTYPES.index(p.dtype) for p in parameters.values()]))
    transport.traffic.sent = sent
    for name, kinds in zip(parameters, agreed.T.tolist(), strict=True):
        if len(set(kinds)) > 1:
            found = ", ".join(str(FLOAT_DTYPES[kind]) for kind in kinds)
            raise ArgumentError(f"params: {name!r} has the dtypes {found} on the ranks; must have one on all")
    for dtype in dict.fromkeys(p.dtype for p in parameters.values()):
        same = [p for p in parameters.values() if p.dtype is dtype]
        flat = torch.cat([p.detach().reshape(-1).to(transport.device) for p in same])
        dist.broadcast(flat, group=transport.group, group_src=0)
        for p, values in zip(same, flat.split([p.numel() for p in same]), strict=True):
            p.copy_(values.view(p.shape))


def check_dense(parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse sparse gradients, before anything is sent.

    Raises:
        UnsupportedError: names the first parameter that has one.
    """
    for name, p in parameters.items():
        if p.grad is not None and p.grad.layout is not torch.strided:
            raise UnsupportedError(
                f"{name}.grad: has layout {p.grad.layout}; gradients must be dense (an Embedding with sparse=False)"
            )


def agree(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], transport: Transport
) -> Agreed | None:
    """Return what all ranks know of this step, or None where a gradient is not finite on any of them.

    A GradScaler leaves ``grad_scale`` and ``found_inf`` at an optimizer that has ``_step_supports_amp_scaling``, and
    leaves the decision to it.
    """
    scale = getattr(optimizer, "grad_scale", None)
    inverse = 1.0 if scale is None else 1.0 / float(scale)
    finite = not float(getattr(optimizer, "found_inf", 0.0))
    finite = finite and all(_usable(p.grad, inverse) for p in parameters.values() if _has_gradient(p))
    own = torch.tensor([finite, *(_has_gradient(p) for p in parameters.values())])
    agreed = transport.gather_values(own)
    if not bool(agreed[:, 0].all()):
        return None
    present = agreed[:, 1:].any(0).tolist()
    silent = frozenset(name for name, there in zip(parameters, present, strict=True) if not there)
    return Agreed(silent=silent, inverse=inverse)


def take_gradient(p: nn.Parameter, agreed: Agreed) -> torch.Tensor | None:
    """Return a parameter's gradient in float32, unscaled, in memory that may be its own; None where it has none.

    ``p.grad`` is unscaled, too, as with any other optimizer under a GradScaler.
    """
    if not _has_gradient(p):
        return None
    assert p.grad is not None
    gradient = p.grad.float()
    if agreed.inverse != 1.0:
        gradient = gradient * agreed.inverse
        p.grad.copy_(gradient)
    return gradient


def _has_gradient(p: nn.Parameter) -> bool:
    return p.requires_grad and p.grad is not None  # one that was frozen later may still hold an old gradient


def _usable(gradient: torch.Tensor | None, inverse: float) -> bool:
    """Return whether a gradient and its squares are finite in float32."""
    if gradient is None or not gradient.numel():
        return True
    ends = torch.stack(torch.aminmax(gradient.float())) * inverse
    return math.isfinite((ends * ends).max().item())
