"""What every quantized layer is: a float class with another forward, so parameters, hooks and references stay."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gradbits.core.errors import ArgumentError
from gradbits.core.grain import PerChannel
from gradbits.core.noise import draw_seed
from gradbits.nn.activated import activation_of
from gradbits.nn.assigned import Assigned
from gradbits.nn.assignment import QuantizerStates
from gradbits.nn.bilinear import Bilinear
from gradbits.nn.call import Call, without_autocast
from gradbits.nn.function import QuantizedProduct
from gradbits.nn.refuse import refuse_transforms
from gradbits.quantizers.quantizer import Quantizer
from gradbits.quantizers.ranges import State
from gradbits.recipes.recipe import Recipe


class Quantized(Assigned):
    """What the quantized classes add to their float class; ``assign`` turns a float layer into one."""

    def compute(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return the output for an input and the layer's parameters; for a product of two tensors ``weight`` is one."""
        raise NotImplementedError

    def like_output(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return a tensor of the shape and memory order of the output, computed in float."""
        raise NotImplementedError

    def products(self, input_size: tuple[int, ...]) -> Bilinear:
        """Return the layer's three products for an input of spatial size ``input_size``."""
        raise NotImplementedError

    def channels(self, role: str, axis: int) -> int:
        """Return how many scales an operand has along ``axis``."""
        raise NotImplementedError

    def run(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, size: tuple[int, ...]) -> Any:
        """Return the layer's output for canonical operands."""
        link = self.assignment.link
        return self.product(x, weight, bias, size) if link is None else link.run(self, x, weight, bias, size)

    def product(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        size: tuple[int, ...],
        given: tuple[Quantizer, State] | None = None,
    ) -> torch.Tensor:
        """Return the quantized product of canonical operands.

        Args:
            x, weight, bias: operands.
            size: spatial size of the input.
            given: quantizer of ``x`` and its state, where others keep it; else the layer's own.
        """
        a, module = self.assignment, self
        recipe = a.recipe
        if given is not None and recipe.output is not None:
            recipe = replace(recipe, output=replace(recipe.output, input=given[0]))

        def state_of(product: str, role: str) -> State:
            return given[1] if given is not None and role == "input" else self.state_of(product, role)

        device = x.device.type
        dtype = torch.promote_types(x.dtype, weight.dtype)
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        training = bool(getattr(module, "training", True))
        recomputing = torch._C._current_graph_task_id() != -1  # activation checkpointing runs forward inside backward
        learned = self.learned()
        call = Call(
            products=self.products(size),
            recipe=recipe,
            state_of=state_of,
            compute=a.compute,
            # reentrant checkpointing runs the first forward without gradients: it must draw as the second will
            seed=draw_seed() if a.recipe.is_stochastic and (training or torch.is_grad_enabled()) else 0,
            update=training and not recomputing and given is None,
            training=training,
            on_nonfinite=a.on_nonfinite,
            name=a.name,
            dtype=dtype,
            learned=tuple(learned),
            activation=activation_of(self),
        )
        with without_autocast(device):
            call = call.started({"input": x, "weight": weight}, bias)
            if bias is not None and a.recipe.output is not None and a.recipe.output.weight.range.scales_bias:
                bias = a.recipe.output.weight.range.scaled_bias(bias, call.state_of("output", "weight"))
            if a.seen is not None:
                return call.twice({"input": x, "weight": weight}, bias, a.seen)
            y: torch.Tensor = QuantizedProduct.apply(x, weight, bias, call, *learned.values())
        a.shapes = ({"input": x.shape, "weight": weight.shape, "gradient": y.shape}, size)
        return y

    def weight_quantizer(self) -> Quantizer:
        """Return the quantizer of the weight in ``output``, in the layer's own layout."""
        output = self.assignment.recipe.output
        if output is None:
            raise ArgumentError(f"layer {self.assignment.name!r}: its recipe quantizes no weight in output")
        grain = self.products(spatial_example(self)).grain("weight", output.weight.grain)  # type: ignore[arg-type]
        return replace(output.weight, grain=grain)

    def learned(self) -> dict[tuple[str, str], torch.Tensor]:
        """Return the learned entries of the forward operands' states by (role, name)."""
        output = self.assignment.recipe.output
        if output is None:
            return {}
        quantizers = {"input": output.input, "weight": output.weight}
        return {
            (role, name): self.state_of("output", role)[name]
            for role, q in quantizers.items()
            for name in q.range.learned
        }

    def state_of(self, product: str, role: str) -> State:
        """Return the state of an operand's quantizer; empty where it remembers nothing."""
        slot = self.assignment.slots.get((product, role))
        states = None if slot is None else getattr(self, "quantizers", None)
        if states is None:
            return {}
        prefix = f"{slot}_"
        return {name[len(prefix) :]: t for name, t in states.entries().items() if name.startswith(prefix)}


def init_states(layer: Quantized, recipe: Recipe) -> tuple[QuantizerStates | None, dict[tuple[str, str], str]]:
    """Return a layer's range states and which operand uses which."""
    states = QuantizerStates()
    slots: dict[tuple[str, str], str] = {}
    known: dict[tuple[str, Quantizer], str] = {}
    for product, role, q in recipe.operands():
        if (role, q) not in known:
            if not q.init_state(1):
                continue
            groups = layer.channels(role, q.grain.axis) if isinstance(q.grain, PerChannel) else 1
            initial = q.init_state(groups)
            known[role, q] = f"{product}_{role}"
            for name, value in initial.items():
                full = f"{product}_{role}_{name}"
                if name in q.range.learned:
                    states.register_parameter(full, nn.Parameter(value))
                else:
                    states.register_buffer(full, value)
        slots[product, role] = known[role, q]
    return (states if known else None), slots


def check_size(layer: Quantized, x: torch.Tensor, axes: tuple[int, ...], size: int, what: str) -> None:
    """Refuse an input that the layer does not take, first of all of another shape: kernels trust the sizes they get.

    Args:
        layer: names it.
        x: its input.
        axes: how many axes it may have; with one entry, that many or more. The first entry counts the axes from the
            checked one to the last.
        size: what the checked axis must have.
        what: what that axis holds.
    """
    refuse_transforms(layer.assignment.name, x)
    enough = x.dim() >= axes[0] if len(axes) == 1 else x.dim() in axes
    if not enough or x.shape[-axes[0]] != size:
        legal = f"at least {axes[0]}" if len(axes) == 1 else " or ".join(map(str, axes))
        raise ArgumentError(
            f"input: shape {tuple(x.shape)} does not fit layer {layer.assignment.name!r}; must have {legal} axes and "
            f"{size} {what}"
        )


def spatial_example(layer: nn.Module) -> tuple[int, ...]:
    """Return some legal spatial input size of a layer, for questions that do not depend on it."""
    kernel = getattr(layer, "kernel_size", ())
    dilation = getattr(layer, "dilation", ())
    return tuple(math.prod((k, d)) + 1 for k, d in zip(kernel, dilation, strict=True))
