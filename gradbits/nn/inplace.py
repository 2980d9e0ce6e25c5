"""In-place operations of a traced graph, rewritten so that every value stays what it was: a graph knows no memory."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.fx import Node

from gradbits.core.errors import GraphError

OPERATORS = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
SIZES = ("size", "dim", "numel", "ndimension", "element_size", "shape", "ndim", "dtype", "device")
# what may give its input's memory back under another name
VIEWS = {
    "view", "view_as", "reshape", "reshape_as", "flatten", "ravel", "permute", "transpose", "swapaxes", "swapdims",
    "movedim", "moveaxis", "t", "adjoint", "contiguous", "squeeze", "unsqueeze", "expand", "expand_as",
    "broadcast_to", "narrow", "select", "chunk", "split", "tensor_split", "hsplit", "vsplit", "dsplit", "unbind",
    "unfold", "unflatten", "diagonal", "detach", "to", "type", "type_as", "float", "half", "bfloat16", "double",
    "cpu", "cuda", "getitem", "real", "imag", "as_strided", "atleast_1d", "atleast_2d", "atleast_3d", "dropout",
    "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "T", "mT",
    "H", "mH", "data", "split_with_sizes", "slice_scatter",
}


class OutOfPlace:
    """An in-place operation that works on a copy and returns it.

    Args:
        target: a function, or the name of a tensor's method.

    >>> x = torch.ones(2)
    >>> OutOfPlace("mul_")(x, 3.0).tolist(), x.tolist()
    ([3.0, 3.0], [1.0, 1.0])
    """

    def __init__(self, target: Any) -> None:
        self.target = target
        self.__name__ = str(target if isinstance(target, str) else getattr(target, "__name__", target))

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the changed copy."""
        x = x.clone() if isinstance(x, torch.Tensor) else x
        changed = getattr(x, self.target) if isinstance(self.target, str) else None
        return changed(*args, **kwargs) if changed is not None else self.target(x, *args, **kwargs)


def make_functional_(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Let nothing in ``graph`` change a value: an in-place operation gives a new one, which later users read.

    Modules with ``inplace=True`` stay in the graph; whoever runs them hands them a copy.

    Raises:
        GraphError: a changed value is read later under another name (a view of it), or is a tensor of the model.
    """
    roots: dict[Node, Node] = {}  # whose memory a node may give
    present: dict[Node, Node] = {}  # the node that has an older one's value now, after it was changed
    stale: dict[Node, Node] = {}  # a view of what a later node has changed -> that node
    for node in list(graph.nodes):
        for used in node.all_input_nodes:
            if used in stale and not _is_size(node):
                raise _refusal(stale[used], modules, f"{node.name} reads it later as {used.name}")
        for used in node.all_input_nodes:
            if used in present:
                node.replace_input_with(used, present[used])
        changed = _changed(node, modules)
        if changed is None:
            first = _first(node)
            shares = first is not None and _may_share(node, modules)
            roots[node] = roots[first] if shares and first is not None else node
            continue
        if isinstance(changed, str):
            raise _refusal(node, modules, changed)
        root = roots[node] = roots[changed]
        if root.op == "get_attr":
            raise _refusal(node, modules, f"{root.target} is a tensor of the model, whose change would be lost")
        for other, where in roots.items():
            if where is root and other is not node and present.get(other, other) is not changed:
                stale[other] = node
        stale.pop(changed, None)
        for other in [old for old, new in present.items() if new is changed]:
            present[other] = node
        present[changed] = node
        _rewrite(node)


def _refusal(node: Node, modules: dict[str, nn.Module], why: str) -> GraphError:
    what = f"{node.target!r} ({type(modules[str(node.target)]).__name__})" if node.op == "call_module" else node.name
    return GraphError(
        f"model: {what} changes a value in place and {why}; use the form that returns a new value "
        "(inplace=False, add for add_, y = y + x for y += x)"
    )


def _first(node: Node) -> Node | None:
    first = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
    return first if isinstance(first, Node) else None


def _name(node: Node) -> str:
    if node.target is getattr:
        return str(node.args[1])
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))


def _may_share(node: Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], (nn.Flatten, nn.Unflatten, *IDENTITIES))
    return node.op in ("call_function", "call_method") and _name(node) in VIEWS


def _is_size(node: Node) -> bool:
    """Whether a node gives sizes or other numbers that no change of values moves."""
    if node.op == "call_method" or node.target is getattr:
        return _name(node) in SIZES
    inputs = node.all_input_nodes
    numbers = node.op == "call_function" and (node.target is operator.getitem or _name(node) in dir(operator))
    return numbers and bool(inputs) and all(_is_size(used) for used in inputs)


def _changed(node: Node, modules: dict[str, nn.Module]) -> Node | str | None:
    """Return the value that a node changes, None where it changes nothing, or why it cannot be said."""
    if node.op not in ("call_module", "call_function", "call_method"):
        return None
    if node.kwargs.get("out") is not None:
        return "writes into out="
    name, first = _name(node), _first(node)
    if node.op == "call_module":
        changes = bool(getattr(modules[str(node.target)], "inplace", False))
    elif node.op == "call_method":
        changes = name.endswith("_") and not name.endswith("__")
    else:
        plain = name.endswith("_") and not name.endswith("__") and not hasattr(operator, name)
        changes = plain or name in OPERATORS or _has_inplace(node)
    if not changes or (first is not None and _is_size(first)):
        return None
    return first if first is not None else "which value that is cannot be told"


def _bound(node: Node) -> inspect.BoundArguments | None:
    try:
        signature = inspect.signature(node.target)  # type: ignore[arg-type]
        return signature.bind(*node.args, **node.kwargs) if "inplace" in signature.parameters else None
    except (TypeError, ValueError):  # a function of PyTorch's core, which has no such argument
        return None


def _has_inplace(node: Node) -> bool:
    bound = _bound(node)
    return bound is not None and bool(bound.arguments.get("inplace", False))


def _rewrite(node: Node) -> None:
    """Give an in-place function or method its form that returns a new value."""
    if node.op == "call_module":
        return
    bound = _bound(node) if node.op == "call_function" else None
    if bound is not None and bound.arguments.get("inplace", False):
        bound.arguments["inplace"] = False
        node.args, node.kwargs = bound.args, bound.kwargs
    elif node.target is operator.iadd:
        node.target = operator.add
    elif node.op == "call_method" and node.target in ("add_", "relu_"):
        node.target = str(node.target)[:-1]
    elif node.target is torch.relu_:
        node.target = torch.relu
    else:
        target = node.target
        node.op, node.target = "call_function", OutOfPlace(target)


def in_place_operators() -> Iterator[tuple[str, Any]]:
    """Yield the special method and the function of every in-place operator that tensors have."""
    for name in OPERATORS:
        yield f"__{name}__", getattr(operator, name)
