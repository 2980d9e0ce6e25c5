"""Whether quantizing a layer pays: what its forward and backward pass need in float and as they are, measured."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import nn

from gradbits.core.errors import ArgumentError
from gradbits.nn.assigned import Assigned

ROUNDS = 3  # of which the fastest counts; the first run of each only warms up


def layer_speeds(model: nn.Module, inputs: Sequence[Any]) -> dict[str, float]:
    """Return how many times faster each quantized layer is than its float class: name -> ratio.

    The model runs forward once, without gradients, to see what each layer gets; then every layer runs forward and
    backward alone, in float and quantized in turns, on copies: gradients, quantizer states and random numbers stay.

    Args:
        model: with quantized layers.
        inputs: what its forward takes, in order.

    Raises:
        ArgumentError: ``inputs`` is no tuple or list.
    """
    if not isinstance(inputs, (tuple, list)):
        raise ArgumentError(f"inputs: must be a tuple of what the model's forward takes, not {type(inputs).__name__}")
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        seen = _inputs_of_layers(model, inputs)
        return {name: _ratio(layer, given) for name, (layer, given) in seen.items()}


def _inputs_of_layers(model: nn.Module, inputs: Sequence[Any]) -> dict[str, tuple[nn.Module, tuple[torch.Tensor, ...]]]:
    """Return the quantized layers that a forward pass reaches, and what each gets."""
    seen: dict[str, tuple[nn.Module, tuple[torch.Tensor, ...]]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, Assigned) and isinstance(module, nn.Module):

            def note(layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any], name: str = name) -> None:
                in_order = inspect.signature(type(layer).forward).bind(layer, *args, **named).args[1:]
                seen.setdefault(name, (layer, tuple(a.detach() for a in in_order if isinstance(a, torch.Tensor))))

            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()  # running statistics stay
        with torch.no_grad():
            model(*inputs)
    finally:
        for module, training in modes.items():
            module.training = training
        for handle in handles:
            handle.remove()
    return seen


def _ratio(layer: Any, given: tuple[torch.Tensor, ...]) -> float:
    """Return the time of a layer in float divided by that of the quantized one."""
    own, twin = copy.deepcopy(layer), copy.deepcopy(layer)
    twin.__class__ = layer.float_class
    for module in (own, twin):  # hooks belong to the model's own training
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(module, hooks).clear()
        module.train()
    floats = [t.dtype for t in given if t.is_floating_point()]  # they differ where autocast brought them together
    widest = reduce(torch.promote_types, floats, torch.bfloat16) if len(set(floats)) > 1 else None
    x = tuple(t.to(widest or t.dtype, copy=True).requires_grad_() if t.is_floating_point() else t for t in given)
    g = torch.ones_like(twin(*x))
    times = {id(own): float("inf"), id(twin): float("inf")}
    for turn in range(ROUNDS + 1):
        for module in (own, twin):
            wanted = (*x, *(p for p in module.parameters() if p.requires_grad))
            _wait(g.device)
            started = time.perf_counter()
            torch.autograd.grad(module(*x), wanted, g, allow_unused=True)
            _wait(g.device)
            if turn:
                times[id(module)] = min(times[id(module)], time.perf_counter() - started)
    return times[id(twin)] / max(times[id(own)], 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
