"""Tracing: a model's forward as one graph for training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.fx import Node
from torch.fx.node import map_aggregate, map_arg

from gradbits.core.errors import GraphError
from gradbits.nn.attention import ScaledDotProductAttention
from gradbits.nn.inplace import in_place_operators, make_functional_
from gradbits.nn.matmul import Matmul
from gradbits.nn.quantized import Quantized

_TRAINING = "gradbits_training"


class _Proxy(fx.Proxy):
    """A value that notes ``y += x`` as what it is: PyTorch's own notes ``y + x``, so other names of y would stay."""


def _operator(function: Any) -> Any:
    def noted(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return noted


for _method, _function in in_place_operators():
    setattr(_Proxy, _method, _operator(_function))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = isinstance(m, (Quantized, Matmul, ScaledDotProductAttention))
        return own or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: Node) -> fx.Proxy:
        return _Proxy(node, self)


def trace(model: nn.Module) -> fx.Graph:
    """Return the graph of ``model`` down to PyTorch's layers and functions, without in-place operations.

    Its arguments are those of evaluation; ``arguments_of`` gives those of training where ``self.training`` decides.

    Raises:
        GraphError: its forward depends on values, takes other steps in training than in evaluation, or changes values
            in place in a way that cannot be followed.
    """
    if isinstance(model, Quantized):
        graph = fx.Graph()
        x = graph.placeholder("input")
        graph.output(graph.call_module("", (x,)))
        return graph
    training, evaluation = (_traced(model, mode) for mode in (True, False))
    modules = dict(model.named_modules())
    for graph in (training, evaluation):
        make_functional_(graph, modules)
    _merge_(model, evaluation, training)
    return evaluation


def arguments_of(node: Node, model: nn.Module) -> tuple[Any, Any]:
    """Return positional and keyword arguments of a node in the present mode of the module whose forward has it."""
    if _TRAINING not in node.meta:
        return node.args, node.kwargs
    owner, args, kwargs = node.meta[_TRAINING]
    return (args, kwargs) if model.get_submodule(owner).training else (node.args, node.kwargs)


def _traced(model: nn.Module, mode: bool) -> fx.Graph:
    try:
        with _mode(model, mode):
            return _Tracer().trace(model)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise GraphError(
            f"model: its forward cannot be traced: {reason}. This recipe quantizes the whole graph; let forward take "
            "tensors and depend on no values (torch.fx.symbolic_trace must succeed), or call quantize_ on the part of "
            "the model that does, such as its backbone"
        ) from error


@contextmanager
def _mode(model: nn.Module, mode: bool) -> Iterator[None]:
    """Put all modules into training or evaluation mode, each back into its own afterwards."""
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = mode
        yield
    finally:
        for module, own in before:
            module.training = own


def _merge_(model: nn.Module, evaluation: fx.Graph, training: fx.Graph) -> None:
    """Note in ``evaluation`` where training has other numbers among its arguments; refuse any other difference."""
    twins: dict[Node, Node] = {}
    pairs = list(zip(training.nodes, evaluation.nodes, strict=False))
    for other, node in pairs:
        if not _same_step(model, node, other, twins):
            raise GraphError(
                f"model: its forward takes other steps in training ({_shown(other)}) than in evaluation "
                f"({_shown(node)}); let self.training decide about numbers alone, as in F.dropout(x, p, "
                "self.training), or call quantize_ on the part of the model that does not depend on it"
            )
        twins[other] = node
        args, kwargs = map_arg(other.args, twins.__getitem__), map_arg(other.kwargs, twins.__getitem__)
        if not (_equal(args, node.args) and _equal(kwargs, node.kwargs)):
            stack = list((node.meta.get("nn_module_stack") or {"": ("", None)}).values())
            node.meta[_TRAINING] = (stack[-1][0], args, kwargs)
    if len(training.nodes) != len(evaluation.nodes):  # never behind the output, where both end
        raise GraphError("model: its forward takes other steps in training than in evaluation")


def _shown(node: Node) -> str:
    return f"returns {node.args[0]}" if node.op == "output" else f"{node.name}{node.args}"


def _same_step(model: nn.Module, node: Node, other: Node, twins: dict[Node, Node]) -> bool:
    """Whether two nodes do the same with the same values, numbers aside."""

    def form(value: Any) -> Any:
        return map_aggregate(value, lambda v: twins.get(v, v) if isinstance(v, Node) else None)

    if node.op != other.op or form((other.args, other.kwargs)) != form((node.args, node.kwargs)):
        return False
    a, b = node.target, other.target
    if node.op == "get_attr" and a != b:  # a tensor that forward makes has another name in every trace
        first, second = (attribute(model, str(target)) for target in (a, b))
        return isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor) and torch.equal(first, second)
    return a == b or (type(a) is type(b) and getattr(a, "target", a) == getattr(b, "target", b))


def attribute(model: nn.Module, path: str) -> Any:
    """Return what lies under a dotted path in a model."""
    value: Any = model
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)
