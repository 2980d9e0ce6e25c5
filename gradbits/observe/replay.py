"""One training step of a quantized model, run again and again with other noise and nothing else changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from gradbits.core.errors import ArgumentError
from gradbits.nn.quantized import Quantized

Layers = list[tuple[str, Any]]
PRODUCTS = ("grad_input", "grad_weight")


@dataclass
class Use:
    """One call of one quantized layer in a step.

    Args:
        name: the layer's name; a second call in the same step ends in ``#2``.
        layer: the layer.
        arguments: what its ``run`` was called with: input, weight, bias, sizes.
        gradient: of its output; None where the loss does not depend on it.
        found: its gradients by product.
    """

    name: str
    layer: Any
    arguments: tuple[Any, ...]
    gradient: torch.Tensor | None = None
    found: dict[str, torch.Tensor] = field(default_factory=dict)


def quantized_layers(model: nn.Module) -> Layers:
    """Return the quantized layers of a model by name."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, Quantized)]


def random_state() -> list[torch.Tensor]:
    """Return the state of PyTorch's generators."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def set_random_state(state: list[torch.Tensor]) -> None:
    """Put PyTorch's generators back into a state."""
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(state[1:])


def copy_states(layers: Layers) -> list[nn.Module | None]:
    """Return copies of the layers' quantizer states."""
    return [copy.deepcopy(getattr(layer, "quantizers", None)) for _, layer in layers]


def restore_states(layers: Layers, states: Sequence[nn.Module | None]) -> None:
    """Put quantizer states back; a range rule may have followed the gradients of a step."""
    for (_, layer), state in zip(layers, states, strict=True):
        if state is not None:
            layer.quantizers.load_state_dict(state.state_dict())


@contextmanager
def exact_backward(layers: Layers) -> Iterator[None]:
    """Within the context the backward products are those of the quantized operands in float, with no noise."""
    recipes = [layer.assignment.recipe for _, layer in layers]
    for (_, layer), recipe in zip(layers, recipes, strict=True):
        layer.assignment.recipe = replace(recipe, grad_input=None, grad_weight=None)
    try:
        yield
    finally:
        for (_, layer), recipe in zip(layers, recipes, strict=True):
            layer.assignment.recipe = recipe


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Leave the model, its gradients and the random state as they were."""
    state = copy.deepcopy(model.state_dict())
    grads = [(p, p.grad) for p in model.parameters()]
    training = [(m, m.training) for m in model.modules()]
    rng = random_state()
    for p, _ in grads:
        p.grad = None
    try:
        yield
    finally:
        set_random_state(rng)
        for module, flag in training:
            module.training = flag
        for p, grad in grads:
            p.grad = grad
        model.load_state_dict(state)


def step(layers: Layers, run: Callable[[], torch.Tensor], start: list[torch.Tensor], draw: int) -> list[Use]:
    """Run a step; return what every quantized layer was called with, and the gradients it received and gave.

    Args:
        layers: the quantized layers.
        run: runs the forward pass and returns a scalar loss.
        start: random state that the step starts from; layers draw their noise elsewhere.
        draw: which noise.

    Raises:
        ArgumentError: ``run`` does not return a scalar loss.
    """
    uses: list[Use] = []
    for index, (name, layer) in enumerate(layers):
        layer.run = _watch(uses, index, name, layer, draw)
    try:
        set_random_state(start)
        with torch.enable_grad():
            loss = run()
            if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
                raise ArgumentError(f"run: must return a scalar loss with a gradient, not {loss!r}")
            loss.backward()
    finally:
        for _, layer in layers:
            del layer.run
    return uses


def _watch(uses: list[Use], index: int, name: str, layer: Any, draw: int) -> Callable[..., torch.Tensor]:
    """Return a ``run`` that notes what goes in and what comes back."""
    plain = type(layer).run

    def watched(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, size: Any) -> torch.Tensor:
        before = sum(use.layer is layer for use in uses)
        arguments = (x.detach(), weight.detach(), None if bias is None else bias.detach(), size)
        use = Use(name if not before else f"{name}#{before + 1}", layer, arguments)
        uses.append(use)
        # views, so that a hook sees the gradient of this call alone
        inputs = [value.view_as(value) if value.requires_grad else value for value in (x, weight)]
        # noise of its own for every layer and draw; the model's other random numbers stay the same
        state = random_state()
        torch.manual_seed((draw << 24) + (index << 8) + before)
        y: torch.Tensor = plain(layer, *inputs, bias, size)
        set_random_state(state)
        if y.requires_grad:
            y.register_hook(lambda g: setattr(use, "gradient", g.detach()))
            for product, value in zip(PRODUCTS, inputs, strict=True):
                if value.requires_grad:
                    value.register_hook(lambda g, product=product: use.found.update({product: g.detach()}))
        return y

    return watched
