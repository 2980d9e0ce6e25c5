"""Quantized layers under ``torch.compile``: one operator in the graph for a layer's forward pass, one for its backward.

The operators run the layer as it runs without a graph, so the numbers are the same. A graph holds numbers and tensors
only: a number stands for the layer, and a tensor that holds a number, the token, for what the layer keeps for its
backward pass, which goes when the token goes.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

_LAYERS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count(1)
# by token: where a layer's output is in autograd's graph, and what has gradients
_KEPT: dict[int, tuple[GradientEdge, list[torch.Tensor]]] = {}


def register(layer: Any) -> None:
    """Give a quantized layer its number; a copy has its own."""
    _define()
    layer.assignment.number = next(_NUMBERS)
    _LAYERS[layer.assignment.number] = layer


def call(layer: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return ``layer.compute(x, weight, bias)``, in the graph that ``torch.compile`` is making if there is one."""
    if torch.compiler.is_compiling() and _can_be_in_graph(layer):
        device = x.device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        grads = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias)]
        return torch.ops.gradbits.layer_forward(x, weight, bias, layer.assignment.number, cast, grads)[0]
    return _outside(layer, x, weight, bias)


def _can_be_in_graph(layer: Any) -> bool:
    """Whether the operators' arguments are all that the layer depends on and changes, but for ranges it remembers."""
    a = layer.assignment
    return not torch.compiler.is_exporting() and a.link is None and a.seen is None and not a.learns


@torch.compiler.disable(recursive=True)
def _outside(layer: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    found: torch.Tensor = layer.compute(x, weight, bias)
    return found


@contextmanager
def _recording(grad: bool) -> Iterator[None]:
    """A context in which autograd records: within an operator PyTorch has switched its dispatch off."""
    names = ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView")
    kinds = [getattr(torch._C.DispatchKey, name) for name in names]
    off = [kind for kind in kinds if torch._C._dispatch_tls_is_dispatch_key_excluded(kind)]
    try:
        for kind in off:
            torch._C._dispatch_tls_set_dispatch_key_excluded(kind, False)
        with torch.set_grad_enabled(grad):
            yield
    finally:
        for kind in off:
            torch._C._dispatch_tls_set_dispatch_key_excluded(kind, True)


@lru_cache(maxsize=1)
def _define() -> None:
    """Define the operators, once, when the first layer may need them.

    PyTorch's caches know a graph by the names of its operators, not by what their backward pass calls: a change of
    either signature needs another name for the forward operator.
    """
    output = torch.library.custom_op("gradbits::layer_forward", _output, mutates_args=())
    output.register_fake(_fake_output)
    output.register_autograd(_backward, setup_context=_setup)
    gradients = torch.library.custom_op("gradbits::layer_backward", _gradients, mutates_args=())
    gradients.register_fake(_fake_gradients)


class _Lent(torch.autograd.Function):
    """An activation whose gradient goes to a stand-in without memory, so that autograd does not hold it as a leaf."""

    @staticmethod
    def forward(ctx: Any, stand_in: torch.Tensor, x: list[torch.Tensor]) -> torch.Tensor:
        return x[0].detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


def _operand(t: torch.Tensor | None, wanted: bool, kept: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return an operand as a layer gets it, and what its gradient is asked for.

    Args:
        t: the operand, or None.
        wanted: whether it has a gradient.
        kept: whether it is a parameter, which stays in memory anyway.
    """
    if t is None or not wanted:
        return (None if t is None else t.detach()), None
    if kept:
        leaf = t.detach().requires_grad_()
        return leaf, leaf
    stand_in = t.new_empty(()).expand(t.shape).requires_grad_()
    return _Lent.apply(stand_in, [t]), stand_in


def _output(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    layer: int,
    cast: torch.dtype | None,
    grads: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    token = torch.zeros(1, dtype=torch.int64)
    own = bool(next(_LAYERS[layer].parameters(recurse=False), None) is not None)
    with _recording(any(grads)):
        pairs = [
            _operand(t, wanted, kept)
            for t, wanted, kept in zip((x, weight, bias), grads, (False, own, own), strict=True)
        ]
        with torch.autocast(x.device.type, cast, enabled=cast is not None):
            y = _LAYERS[layer].compute(*(operand for operand, _ in pairs))
        if any(grads):
            number = next(_NUMBERS)
            token.fill_(number)
            _KEPT[number] = (get_gradient_edge(y), [leaf for _, leaf in pairs if leaf is not None])
            weakref.finalize(token, _KEPT.pop, number, None)
    return y.detach(), token


def _fake_output(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    layer: int,
    cast: torch.dtype | None,
    grads: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    y = _LAYERS[layer].like_output(x, weight, bias)
    dtype = cast or torch.promote_types(x.dtype, weight.dtype)
    return torch.empty_like(y, dtype=dtype), torch.empty(1, dtype=torch.int64)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *operands, _, _, ctx.grads = inputs
    x = operands[0]
    ctx.save_for_backward(output[1])
    ctx.shapes = [[] if t is None else list(t.shape) for t in operands]
    ctx.dtypes = [x.dtype if t is None else t.dtype for t in operands]
    ctx.last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _backward(ctx: Any, g: torch.Tensor, _: Any) -> tuple[Any, ...]:
    (token,) = ctx.saved_tensors
    found = torch.ops.gradbits.layer_backward(g, token, *ctx.shapes, *ctx.dtypes, ctx.last, list(ctx.grads))
    return *(t if wanted else None for t, wanted in zip(found, ctx.grads, strict=True)), None, None, None


def _gradients(
    g: torch.Tensor,
    token: torch.Tensor,
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    bias_shape: Sequence[int],
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    last: bool,
    grads: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, operands = _KEPT[int(token)]
    with _recording(True):
        found = iter(torch.autograd.grad(y, operands, g, retain_graph=True))
    x, w, b = (_whole(next(found)) if wanted else g.new_empty(0) for wanted in grads)
    if grads[0]:
        x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    return x, w.contiguous(), b.contiguous()


def _whole(x: torch.Tensor) -> torch.Tensor:
    """Return a gradient as an operator may: those without elements may be one tensor for several operands."""
    return x if x.numel() else torch.empty_like(x)


def _fake_gradients(
    g: torch.Tensor, token: torch.Tensor, *others: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *like, last, grads = others
    shapes, dtypes = like[:3], like[3:]
    x, w, b = (
        g.new_empty(tuple(shape), dtype=dtype) if wanted else g.new_empty(0)
        for shape, dtype, wanted in zip(shapes, dtypes, grads, strict=True)
    )
    return x.contiguous(memory_format=torch.channels_last) if grads[0] and last else x, w, b
