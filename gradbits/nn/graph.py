"""The graph of a model: which values become integers, and which layers, norms and activations are one step."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from gradbits.nn.convolutions import QuantizedConvTranspose1d, QuantizedConvTranspose2d, QuantizedConvTranspose3d
from gradbits.nn.fold import why_not_foldable
from gradbits.nn.quantized import Quantized
from gradbits.nn.tracing import trace

ADD = (operator.add, operator.iadd, torch.add)
CAT = (torch.cat, torch.concat, torch.concatenate)
TRANSPOSED = (QuantizedConvTranspose1d, QuantizedConvTranspose2d, QuantizedConvTranspose3d)
MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
ADAPTIVE = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
SHAPES = ("view", "reshape", "flatten", "permute", "transpose", "contiguous", "squeeze", "unsqueeze")
MOVES = (torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze)
MAX_POOL_FUNCTIONS = (F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d)
INTEGER = ("input", "layer", "add", "cat", "mean")  # what makes new codes; "passive" hands on those that it gets


@dataclass
class Step:
    """One step of the graph: a node, or several that are computed as one.

    Args:
        node: whose value it gives; its name is the step's.
        kind: one of ``INTEGER``, ``"passive"`` (moves codes or picks among them), ``"shape"`` (sizes, no values),
            ``"float"`` or ``"output"``.
        head: the first of its nodes: the layer, the addition.
        norm: path of the batch norm folded into the layer.
        bounds: lowest and highest value of the fused activation.
        why: for ``"float"``, why it has no integer form.
    """

    node: Node
    kind: str
    head: Node
    norm: str | None = None
    bounds: tuple[float | None, float | None] = (None, None)
    why: str = ""


@dataclass
class Plan:
    """The steps of a model in their order, and which of them give values that are quantized.

    Args:
        steps: by the node whose value they give.
        sources: node of a quantized value -> the nodes of layers and operations that take it in as codes.
    """

    steps: dict[Node, Step]
    sources: dict[Node, list[Node]] = field(default_factory=dict)

    @property
    def left_in_float(self) -> list[Step]:
        """The steps that have no integer form."""
        return [step for step in self.steps.values() if step.kind == "float"]


def plan_of(model: nn.Module) -> Plan:
    """Return the plan of a model whose layers are quantized.

    Raises:
        GraphError: the model cannot be traced.
    """
    graph, modules = trace(model), dict(model.named_modules())
    called: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            called[str(node.target)] = called.get(str(node.target), 0) + 1
    plan, fused = Plan({}), set()
    for node in graph.nodes:
        if node in fused:
            continue
        step = _step(node, modules, called, plan)
        if step.kind == "layer":
            _fuse_norm(step, modules, called)
        if step.kind in ("layer", "add"):
            _fuse_activation(step, modules)
        last = step.node
        while last is not step.head:
            fused.add(last)
            last = last.all_input_nodes[0]
        plan.steps[step.node] = step
    _find_sources(plan)
    return plan


def operands(step: Step) -> list[Node]:
    """Return the values that a step computes with."""
    args = step.head.args
    if step.kind == "cat":
        return list(args[0] if args else step.head.kwargs["tensors"])  # type: ignore[arg-type]
    if step.kind == "add":
        return [args[0], args[1]]  # type: ignore[list-item]
    if step.kind in ("layer", "mean", "passive"):
        first = args[0] if args else next(iter(step.head.kwargs.values()))
        return [first]  # type: ignore[list-item]
    return list(step.head.all_input_nodes)


def source_of(plan: Plan, node: Node) -> Node:
    """Return the node whose codes ``node`` hands on; itself where it makes its own."""
    while plan.steps[node].kind == "passive":
        node = operands(plan.steps[node])[0]
    return node


def activation_bounds(node: Node, modules: dict[str, nn.Module]) -> tuple[float | None, float | None] | None:
    """Return the bounds of an activation that only clamps, or None for anything else."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        if type(module) is nn.ReLU:
            return 0.0, None
        if type(module) in (nn.ReLU6, nn.Hardtanh):
            low, high = float(module.min_val), float(module.max_val)  # type: ignore[arg-type]
            return (low, high) if low <= 0 <= high else None
        return None
    if node.op == "call_function" and node.target in (F.relu, torch.relu, torch.relu_, F.relu6):
        return 0.0, (6.0 if node.target is F.relu6 else None)
    return (0.0, None) if node.op == "call_method" and node.target in ("relu", "relu_") else None


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _fuse_norm(step: Step, modules: dict[str, nn.Module], called: dict[str, int]) -> None:
    layer: Any = modules[str(step.head.target)]
    user = _only_user(step.node)
    if user is None or user.op != "call_module" or isinstance(layer, TRANSPOSED) or called[str(user.target)] > 1:
        return
    if why_not_foldable(modules[str(user.target)], layer) is None:
        step.norm, step.node = str(user.target), user


def _fuse_activation(step: Step, modules: dict[str, nn.Module]) -> None:
    user = _only_user(step.node)
    bounds = None if user is None else activation_bounds(user, modules)
    if user is not None and bounds is not None:
        step.bounds, step.node = bounds, user


def _step(node: Node, modules: dict[str, nn.Module], called: dict[str, int], plan: Plan) -> Step:
    """Return the step of one node alone."""
    if node.op in ("placeholder", "output"):
        return Step(node, "input" if node.op == "placeholder" else "output", node)
    kind, why = _kind(node, modules, called, plan)
    step = Step(node, kind, node, why=why)
    if kind in ("add", "cat", "mean"):
        floats = [n for n in operands(step) if not _is_integer(plan, n)]
        if floats:
            return Step(node, "float", node, why=f"{floats[0].name} is in float")
    if kind == "passive" and plan.steps[source_of(plan, operands(step)[0])].kind not in INTEGER:
        return Step(node, "float", node, why=f"{operands(step)[0].name} is in float")
    return step


def _is_integer(plan: Plan, value: Any) -> bool:
    return isinstance(value, Node) and plan.steps[source_of(plan, value)].kind in INTEGER


def _kind(node: Node, modules: dict[str, nn.Module], called: dict[str, int], plan: Plan) -> tuple[str, str]:
    """Return the kind of a node, and for ``"float"`` why."""
    if node.op == "call_module":
        return _module_kind(str(node.target), modules[str(node.target)], called)
    if node.op == "get_attr":
        return "float", f"{node.target} is a tensor of the model"
    target, args, kwargs = node.target, node.args, node.kwargs
    name = str(target if isinstance(target, str) else getattr(target, "__name__", target))
    if any(isinstance(a, Node) and plan.steps[a].kind == "shape" for a in args[:2]) and not _holds_values(plan, args):
        return "shape", ""
    if (target in ADD or (node.op == "call_method" and target in ("add", "add_"))) and len(args) == 2:
        both = all(isinstance(a, Node) for a in args) and not kwargs
        return ("add", "") if both else ("float", f"{name} has an operand that is no value of the graph")
    if target in CAT:
        return "cat", ""
    if target in (torch.mean, "mean") and mean_axes(node) is not None:
        return "mean", ""
    if target in (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d) and _is_one(args[1]):
        return "mean", ""
    if target is F.avg_pool2d:
        plain = window_of(node) is not None
        return ("mean", "") if plain else ("float", f"{name} pads, rounds sizes up or divides by another number")
    if target in ("size", "dim") or (target is getattr and args[1] == "shape"):
        return "shape", ""
    if target in MAX_POOL_FUNCTIONS:
        plain = max_pool_of(node) is not None
        return ("passive", "") if plain else ("float", f"{name} returns indices or rounds sizes up")
    if target in (F.dropout, torch.dropout):
        off = _dropout_is_off(node)
        return ("passive", "") if off else ("float", f"{name} drops values in evaluation too; give it self.training")
    if target == "view" and any(isinstance(a, torch.dtype) for a in (*args, *kwargs.values())):
        return "float", f"{name} reads the bits as another dtype"
    first = args[0] if args else None
    moves = (node.op == "call_method" and target in SHAPES) or target in MOVES
    if moves or activation_bounds(node, modules) == (0.0, None):
        return "passive", ""
    if target is operator.getitem and not any(n is not first for n in node.all_input_nodes):
        return "passive", ""
    if target is F.pad and _pads_zeros(node):
        return "passive", ""
    return "float", f"{name} has no integer form"


def _module_kind(path: str, module: nn.Module, called: dict[str, int]) -> tuple[str, str]:
    if isinstance(module, Quantized):
        if called[path] > 1:
            return "float", f"layer {path!r} is used more than once"
        if module.assignment.recipe.qat is None:
            return "float", f"layer {path!r} follows recipe {module.assignment.recipe.name!r}"
        return "layer", ""
    if type(module) in ADAPTIVE and _is_one(module.output_size):
        return "mean", ""
    if type(module) in MAX_POOLS:
        plain = not (module.return_indices or module.ceil_mode)
        return ("passive", "") if plain else ("float", f"{path!r} returns indices or rounds sizes up")
    if type(module) is nn.AvgPool2d:
        plain = not module.ceil_mode and module.padding in (0, (0, 0)) and module.divisor_override is None
        return ("mean", "") if plain else ("float", f"{path!r} pads, rounds sizes up or divides by another number")
    if type(module) in (nn.Flatten, nn.ReLU, *IDENTITIES):
        return "passive", ""
    return "float", f"{path!r} ({type(module).__name__}) has no integer form"


def _is_one(size: Any) -> bool:
    return all(n == 1 for n in size) if isinstance(size, (tuple, list)) else size == 1


def mean_axes(node: Node) -> tuple[int, ...] | None:
    """Return the axes of a mean, or None where they are not given or hold the first."""
    axes: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    axes = (axes,) if isinstance(axes, int) else axes
    if axes is None or not all(isinstance(a, int) and a != 0 for a in axes) or node.kwargs.get("dtype") is not None:
        return None
    return tuple(axes)


def window_of(node: Node) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Return window and stride of a call of ``avg_pool2d``, or None where it does more than average windows."""
    names = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if given.get("padding", 0) not in (0, (0, 0), [0, 0]) or given.get("ceil_mode") or given.get("divisor_override"):
        return None
    window, stride = given["kernel_size"], given.get("stride") or given["kernel_size"]
    return _two(window), _two(stride)


def max_pool_of(node: Node) -> nn.Module | None:
    """Return a call of a max pooling function as a module, or None where it does more than take maxima of windows."""
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if given.get("ceil_mode") or given.get("return_indices"):
        return None
    numbers = {key: given[key] for key in names[1:5] if given.get(key) not in (None, (), [])}
    if any(output_nodes(list(numbers.values()))):
        return None
    dims = int(str(getattr(node.target, "__name__", ""))[-2])  # max_pool2d
    return MAX_POOLS[dims - 1](**numbers)


def _dropout_is_off(node: Node) -> bool:
    """Whether a dropout function does nothing in evaluation, whose arguments the graph has."""
    args = dict(zip(("input", "p", "training", "inplace"), node.args, strict=False)) | dict(node.kwargs)
    return args.get("training", args.get("train", True)) is False


def _holds_values(plan: Plan, args: Any) -> bool:
    return any(plan.steps[node].kind != "shape" for node in output_nodes(list(args)))


def _two(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _pads_zeros(node: Node) -> bool:
    args = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | dict(node.kwargs)
    constant = args.get("mode", "constant") == "constant" and args.get("value") in (None, 0, 0.0)
    return constant and not any(isinstance(n, Node) for n in args["pad"])  # type: ignore[union-attr]


def _find_sources(plan: Plan) -> None:
    """Note each value that is taken in as codes; additions, concatenations and means always give codes."""
    for step in plan.steps.values():
        if step.kind in ("layer", "add", "cat", "mean"):
            for node in operands(step):
                plan.sources.setdefault(source_of(plan, node), []).append(step.node)
        if step.kind in ("add", "cat", "mean"):
            plan.sources.setdefault(step.node, [])


def output_nodes(value: Any) -> Iterator[Node]:
    """Yield the nodes in what a graph returns: a value, or tuples, lists and dicts of values."""
    if isinstance(value, Node):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from output_nodes(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from output_nodes(item)
