"""Quantization-aware training of a whole model: its forward follows the graph and quantizes what integers will hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.fx.node import map_arg

from gradbits.core.errors import GraphError
from gradbits.nn.assignment import QuantizerStates
from gradbits.nn.fold import fold, folded_output, has_outputs_at_axis_1
from gradbits.nn.graph import Plan, Step, operands, plan_of, source_of
from gradbits.nn.integer_build import build, why_not_integer
from gradbits.nn.integer_model import IntegerModel
from gradbits.nn.kept_integers import fingerprint
from gradbits.nn.quantized import Quantized, init_states
from gradbits.nn.tracing import arguments_of, attribute
from gradbits.quantizers.estimators import STE, StraightThrough
from gradbits.quantizers.quantizer import Quantizer
from gradbits.quantizers.ranges import State
from gradbits.recipes.recipe import QAT, Recipe


@dataclass
class Phase:
    """What the layers of a graph must know of the current forward pass.

    Args:
        update: whether ranges and running statistics may move.
        delayed: whether activations are not quantized yet.
        frozen: whether batch norms use their running statistics.
    """

    update: bool = False
    delayed: bool = False
    frozen: bool = True


@dataclass
class Link:
    """What ties a layer to the graph around it.

    Args:
        states: the ranges of all values of the graph.
        slot: name of the layer's input among them.
        quantizer: of that value.
        phase: shared by all layers of the graph.
        norm: batch norm folded into the layer, or None.
    """

    states: QuantizerStates
    slot: str
    quantizer: Quantizer
    phase: Phase
    norm: nn.Module | None

    def run(
        self, layer: Quantized, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, size: tuple[int, ...]
    ) -> torch.Tensor:
        """Return the layer's output, its batch norm included."""

        def product(w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
            if self.phase.delayed:
                return _in_float(layer, x, layer.weight_quantizer().fake_quantize(w), b, size)
            # the value is on the grid already: the same range gives the same codes, and nothing is clipped
            given = (replace(self.quantizer, estimator=STE()), state_at(self.states, self.slot))
            return layer.product(x, w, b, size, given)

        if self.norm is None:
            return product(weight, bias)
        if self.phase.frozen or not self.norm.training:
            return product(*fold(self.norm, weight, bias))
        return folded_output(
            self.norm, weight, bias, lambda: _in_float(layer, x, weight, None, size), product, self.phase.update
        )


def _in_float(
    layer: Quantized, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, size: tuple[int, ...]
) -> torch.Tensor:
    products = layer.products(size)
    dtype = torch.promote_types(x.dtype, weight.dtype)
    y = products.in_float("output", x.to(dtype), weight.to(dtype))
    return y if bias is None else y + products.bias_for_output(bias.to(dtype), y.dim())


def state_at(states: QuantizerStates, slot: str) -> State:
    """Return the range state of one value."""
    prefix = f"{slot}__"
    return {name[len(prefix) :]: t for name, t in states.entries().items() if name.startswith(prefix)}


class GraphForward:
    """The forward of a model in quantization-aware training; it takes the place of the model's own.

    In training, values are fake-quantized where integer inference will have codes and layers multiply integers. In
    evaluation the model runs the integers of ``convert_`` themselves wherever it can, so what is measured is what
    will be deployed.

    Args:
        model: whose forward it is.
        recipe: the first of its recipes that asks for it.
        compute: how the products of evaluation are computed.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, compute: str) -> None:
        assert recipe.qat is not None
        self.model, self.recipe, self.compute = model, recipe, compute
        self.rules: QAT = recipe.qat
        self.phase = Phase()
        self._plan: Plan | None = None
        self._kept: tuple[Any, IntegerModel | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_plan": None, "_kept": None}  # a graph cannot be copied; the model's is traced again

    @property
    def plan(self) -> Plan:
        """The model's graph."""
        if self._plan is None:
            self._plan = plan_of(self.model)
        return self._plan

    @property
    def states(self) -> QuantizerStates:
        """The ranges of the graph's values, and how many training steps they have seen; the first layer keeps them.

        A module of the model's own would turn up as one more step of an ``nn.Sequential``.
        """
        found = self.model.get_submodule(first_layer(self.plan)).quantizers
        assert isinstance(found, QuantizerStates)
        return found

    @torch.compiler.disable(recursive=True)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model's own forward returns for the same arguments."""
        training = self.model.training
        recomputing = torch._C._current_graph_task_id() != -1  # activation checkpointing
        steps = self.states.get_buffer("steps")
        if training and not recomputing:
            steps += 1
        count = int(steps)
        self.phase.update = training and not recomputing
        self.phase.delayed = training and count <= self.rules.delay
        self.phase.frozen = not training or (self.rules.freeze is not None and count > self.rules.freeze)
        given = self._arguments(args, kwargs)
        self._layers_are_linked()
        integers = None if training else self._integers(given)
        if integers is not None and not torch.is_grad_enabled():
            return integers
        result = self._follow(given)
        return result if integers is None else _through(result, integers)

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments by the names of the graph's placeholders."""
        inputs = [step.node for step in self.plan.steps.values() if step.kind == "input"]
        names = [str(node.target) for node in inputs]
        if len(args) > len(names) or any(key not in names for key in kwargs):
            raise GraphError(f"model: takes {', '.join(names)}; got {len(args)} arguments and {sorted(kwargs)}")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        for node in inputs:
            if str(node.target) not in given:
                if not node.args:
                    raise GraphError(f"model: argument {node.target!r} is missing")
                given[str(node.target)] = node.args[0]
        return given

    def _layers_are_linked(self) -> None:
        for step in self.plan.steps.values():
            if step.kind == "layer":
                self._check_link(step)

    def _integers(self, given: dict[str, Any]) -> Any:
        """Return the result of integer inference, or None where the model or its input does not allow it."""
        tensors = [value for value in given.values() if isinstance(value, torch.Tensor)]
        if not all(bool(torch.isfinite(t).all()) for t in tensors):
            return None
        integer = self._integer_model()
        if integer is None:
            return None
        with torch.no_grad():
            return integer(**given)

    def _integer_model(self) -> IntegerModel | None:
        """Return the integer model of evaluation, or None where there is none; the last one while it still holds."""
        found = fingerprint(self.model)
        key = None if found is None else (self.compute, found)
        if key is None or self._kept is None or self._kept[0] != key:
            self._kept = (key, self._built())
        return self._kept[1]

    def _built(self) -> IntegerModel | None:
        if why_not_integer(self) is not None:
            return None
        try:
            return build(self).train(False)
        except GraphError:  # scales without a fixed-point form: a network that has diverged
            return None

    def _follow(self, given: dict[str, Any]) -> Any:
        """Go along the graph in floats, quantizing on the way."""
        values: dict[Node, Any] = {}
        for step in self.plan.steps.values():
            if step.kind == "output":
                return map_arg(step.node.args[0], values.__getitem__)
            value = given[str(step.node.target)] if step.kind == "input" else self._compute(step, values)
            if step.node in self.plan.sources and isinstance(value, torch.Tensor) and value.is_floating_point():
                value = self._quantized(step, value)
            values[step.node] = value
        raise GraphError("model: returns nothing")

    def _check_link(self, step: Step) -> None:
        layer: Any = self.model.get_submodule(str(step.head.target))
        link = layer.assignment.link if isinstance(layer, Quantized) else None
        if not isinstance(link, Link) or link.phase is not self.phase:
            raise GraphError(
                f"layer {step.head.target!r} does not follow the graph of the whole model any more; call quantize_ on "
                "the whole model again"
            )

    def _compute(self, step: Step, values: dict[Node, Any]) -> Any:
        head = step.head
        if step.norm is not None:
            self._check_norm(step, values[operands(step)[0]])
        if step.kind == "add":
            first, second = operands(step)
            value = values[first] + values[second]
        else:
            value = _apply(self.model, head, values)
        low, high = step.bounds
        return value if low is None and high is None else value.clamp(low, high)

    def _check_norm(self, step: Step, x: torch.Tensor) -> None:
        layer = self.model.get_submodule(str(step.head.target))
        if not has_outputs_at_axis_1(layer, x):
            raise GraphError(
                f"layer {step.norm!r} ({type(self.model.get_submodule(str(step.norm))).__name__}) normalises axis 1, "
                f"but for an input of shape {tuple(x.shape)} the outputs of layer {step.head.target!r} lie elsewhere, "
                "so it cannot be folded; give the layer [N, C] (or [N, C, ...] to a convolution), for example by "
                f"x.flatten(0, 1), or leave it in float: quantize_(model, {{{step.head.target!r}: None, '*': ...}})"
            )

    def _quantized(self, step: Step, value: torch.Tensor) -> torch.Tensor:
        quantizer, state = self.quantizer(step.node), self.state(step.node)
        if self.phase.delayed:
            if self.phase.update:
                quantizer.range.limits(value.detach(), quantizer.grain, state, True)
            return value
        return quantizer.fake_quantize(value, state=state, update=self.phase.update)

    def state(self, node: Node) -> State:
        """Return the range state of a value."""
        return state_at(self.states, node.name)

    def is_started(self, node: Node) -> bool:
        """Whether a value has been seen, so that its range is known."""
        return bool(torch.isfinite(torch.stack(list(self.state(node).values()))).all())

    def quantizer(self, node: Node) -> Quantizer:
        """Return the quantizer of a value: that of the layers that take it in, of the finest if they differ."""
        found = []
        for user in self.plan.sources[node]:
            if self.plan.steps[user].kind == "layer":
                layer: Any = self.model.get_submodule(str(self.plan.steps[user].head.target))
                found.append(layer.assignment.recipe.output.input)
        assert self.recipe.output is not None
        return max(found, key=lambda q: q.bits) if found else self.recipe.output.input


def _apply(model: nn.Module, node: Node, values: dict[Node, Any]) -> Any:
    """Return what a node of the graph computes."""
    own_args, own_kwargs = arguments_of(node, model)
    args, kwargs = map_arg(own_args, values.__getitem__), map_arg(own_kwargs, values.__getitem__)
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        if getattr(module, "inplace", False):  # others read the value too
            args = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)
            kwargs = {key: a.clone() if isinstance(a, torch.Tensor) else a for key, a in kwargs.items()}
        return module(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "get_attr":
        value = attribute(model, str(node.target))
        # a tensor that forward makes is new in every pass: what changes it, as a batch norm does, changes this one
        return value.clone() if str(node.target).startswith("_tensor_constant") else value
    function: Callable[..., Any] = node.target  # type: ignore[assignment]
    return function(*args, **kwargs)


def _through(result: Any, integers: Any) -> Any:
    """Return the values of ``integers`` with the gradients of ``result``, whatever dtype autocast gave that."""
    if isinstance(result, torch.Tensor):
        if not result.requires_grad:
            return integers
        return StraightThrough.apply(result.to(integers.dtype), integers, None)
    if isinstance(result, dict):
        return type(result)({key: _through(value, integers[key]) for key, value in result.items()})
    if isinstance(result, (tuple, list)):
        parts = [_through(value, other) for value, other in zip(result, integers, strict=True)]
        return type(result)(*parts) if hasattr(result, "_fields") else type(result)(parts)
    return result


def graph_forward(model: nn.Module) -> GraphForward | None:
    """Return the graph forward of a model, or None."""
    found = model.__dict__.get("forward")
    return found if isinstance(found, GraphForward) else None


def follow_graph_(model: nn.Module, compute: str) -> None:
    """Let the forward of ``model`` follow its graph where its layers' recipe asks for it.

    A single layer has no graph around it and quantizes its own input.

    Raises:
        GraphError: the model cannot be traced; nothing has changed.
    """
    layers = [m for m in model.modules() if isinstance(m, Quantized) and m.assignment.recipe.qat is not None]
    plan = plan_of(model) if layers and not isinstance(model, Quantized) else None
    known = graph_forward(model)
    recipe = layers[0].assignment.recipe if layers else None
    kept = dict(known.states.named_buffers()) if known is not None and known.recipe == recipe else {}
    leave_graph_(model)
    if plan is None or recipe is None or not first_layer(plan):
        return
    forward = GraphForward(model, recipe, compute)
    forward._plan = plan
    model.__dict__["forward"] = forward
    states = QuantizerStates()
    states.register_buffer("steps", torch.zeros((), dtype=torch.int64))
    for node in plan.sources:
        for name, value in forward.quantizer(node).init_state(1).items():
            states.register_buffer(f"{node.name}__{name}", value)
    for name, value in states.entries().items():
        if name in kept and kept[name].shape == value.shape:
            value.copy_(kept[name])
    for step in plan.steps.values():
        if step.kind == "layer":
            layer: Any = model.get_submodule(str(step.head.target))
            source = source_of(plan, operands(step)[0])
            norm = None if step.norm is None else model.get_submodule(step.norm)
            layer.assignment.link = Link(states, source.name, forward.quantizer(source), forward.phase, norm)
            del layer.quantizers
    first: Any = model.get_submodule(first_layer(plan))
    first.quantizers = states.to(first.weight.device)


def first_layer(plan: Plan) -> str:
    """Return the path of the first layer of a plan, empty where there is none."""
    return next((str(step.head.target) for step in plan.steps.values() if step.kind == "layer"), "")


def leave_graph_(model: nn.Module) -> None:
    """Give ``model`` and the models in it their own forwards back; their layers keep ranges of their own again."""
    for module in model.modules():
        if graph_forward(module) is not None:
            del module.__dict__["forward"]
        if isinstance(module, Quantized) and module.assignment.link is not None:
            module.assignment.link = None
            layer: Any = module
            layer.quantizers, layer.assignment.slots = init_states(layer, layer.assignment.recipe)
            layer.quantizers.to(layer.weight.device)
