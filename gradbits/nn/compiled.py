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

_LAYERS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count(1)
_KEPT: dict[int, tuple[torch.Tensor, list[torch.Tensor]]] = {}  # by token: a layer's output, and what has gradients


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
        return torch.ops.gradbits.layer_output(x, weight, bias, layer.assignment.number, cast, grads)[0]
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
    """Define the operators, once, when the first layer may need them."""
    output = torch.library.custom_op("gradbits::layer_output", _output, mutates_args=())
    output.register_fake(_fake_output)
    output.register_autograd(_backward, setup_context=_setup)
    gradients = torch.library.custom_op("gradbits::layer_gradients", _gradients, mutates_args=())
    gradients.register_fake(_fake_gradients)


def _output(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    layer: int,
    cast: torch.dtype | None,
    grads: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    token = torch.zeros(1, dtype=torch.int64)
    operands = [
        None if t is None else t.detach().requires_grad_(wanted)
        for t, wanted in zip((x, weight, bias), grads, strict=True)
    ]
    with _recording(any(grads)), torch.autocast(x.device.type, cast, enabled=cast is not None):
        y = _LAYERS[layer].compute(*operands)
    if any(grads):
        number = next(_NUMBERS)
        token.fill_(number)
        _KEPT[number] = (y, [t for t in operands if t is not None and t.requires_grad])
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
    x, weight, bias, _, _, ctx.grads = inputs
    ctx.save_for_backward(output[1], weight, bias)
    ctx.shape, ctx.dtype = x.shape, x.dtype
    ctx.last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _backward(ctx: Any, g: torch.Tensor, _: Any) -> tuple[Any, ...]:
    token, weight, bias = ctx.saved_tensors
    found = torch.ops.gradbits.layer_gradients(
        g, token, weight, bias, list(ctx.shape), ctx.dtype, ctx.last, list(ctx.grads)
    )
    return *(t if wanted else None for t, wanted in zip(found, ctx.grads, strict=True)), None, None, None


def _gradients(
    g: torch.Tensor,
    token: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    last: bool,
    grads: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, operands = _KEPT[int(token)]
    with _recording(True):
        found = iter(torch.autograd.grad(y, operands, g, retain_graph=True))
    x, w, b = (next(found) if wanted else g.new_empty(0) for wanted in grads)
    if grads[0]:
        x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    return x, w.contiguous(), b.contiguous()


def _fake_gradients(
    g: torch.Tensor,
    token: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    last: bool,
    grads: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    order = torch.channels_last if last else torch.contiguous_format
    x = g.new_empty(tuple(shape), dtype=dtype).contiguous(memory_format=order) if grads[0] else g.new_empty(0)
    w = torch.empty(weight.shape, dtype=weight.dtype, device=g.device) if grads[1] else g.new_empty(0)
    b = torch.empty(bias.shape, dtype=bias.dtype, device=g.device) if bias is not None and grads[2] else g.new_empty(0)
    return x, w, b
