"""What was quantized and what was not, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from gradbits.core.checks import check_module
from gradbits.kernels.dispatch import Request, choose
from gradbits.nn.assigned import Assigned
from gradbits.nn.assignment import QuantizerStates
from gradbits.nn.attention import ScaledDotProductAttention
from gradbits.nn.bilinear import OPERANDS
from gradbits.nn.fuse import fused
from gradbits.nn.layers import QUANTIZED_CLASSES
from gradbits.nn.matmul import Matmul
from gradbits.nn.packing import packing_of
from gradbits.nn.quantized import Quantized
from gradbits.nn.quantized_attention import QuantizedAttention
from gradbits.nn.speed import layer_speeds

PRODUCTS = ("output", "grad_input", "grad_weight")
# scores, then values; gradients of probabilities and queries; of keys, then values
ATTENTION_BITS = ("8×8, 21×8", "8×8", "8×8, 21×8")


@dataclass(frozen=True)
class Row:
    """One layer of a report.

    Args:
        name: the layer's name in its model.
        kind: its float class.
        recipe: the recipe it follows, ``"float"`` where none.
        output, grad_input, grad_weight: operand bits of each product, ``"float"`` where it stays in float.
        backend: what computes the products; for the sizes of its last call, once there was one.
        reason: why it was left alone; empty where it is quantized.
        speed: how many times faster it is than in float, forward and backward, where that was measured.
    """

    name: str
    kind: str
    recipe: str
    output: str
    grad_input: str
    grad_weight: str
    backend: str
    reason: str
    speed: float | None = None


@dataclass(frozen=True)
class Report:
    """Every layer that has weights or products, quantized or left alone with the reason.

    Args:
        rows: the layers.
        pack_activations: bits in which forward passes keep activations; None as they are.
        fused: batch norms, with the ReLU behind them, and GELUs that one pass computes, as far as a call has shown.
    """

    rows: tuple[Row, ...]
    pack_activations: int | None = None
    fused: tuple[str, ...] = ()

    @property
    def quantized(self) -> tuple[Row, ...]:
        """The layers that are quantized."""
        return tuple(r for r in self.rows if not r.reason)

    @property
    def left_alone(self) -> tuple[Row, ...]:
        """The layers that are not, each with its reason."""
        return tuple(r for r in self.rows if r.reason)

    @property
    def slower(self) -> tuple[Row, ...]:
        """The layers that were measured to be slower than in float, by more than 5 %."""
        return tuple(r for r in self.rows if r.speed is not None and r.speed < 0.95)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        layers = [asdict(r) for r in self.rows]
        return {"layers": layers, "pack_activations": self.pack_activations, "fused": list(self.fused)}

    def __str__(self) -> str:
        head: tuple[str, ...] = ("layer", "class", "recipe", *PRODUCTS, "computed by", "left in float because")
        table = [head, *(tuple(asdict(r).values())[: len(head)] for r in self.rows)]
        if any(r.speed is not None for r in self.rows):
            speeds = ("float / this", *("" if r.speed is None else f"{r.speed:.2f}" for r in self.rows))
            table = [(*line[:-1], speed, line[-1]) for line, speed in zip(table, speeds, strict=True)]
            head = table[0]
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table]
        done = len(self.quantized)
        lines.append(f"{done} of {len(self.rows)} layers quantized")
        if self.slower:
            names = ", ".join(r.name or "(root)" for r in self.slower)
            lines.append(f"slower than in float on this machine, so better left out by a rule: {names}")
        if self.fused:
            lines.append(f"computed in one pass: {', '.join(self.fused)}")
        if self.pack_activations is not None:
            lines.append(f"activations are kept for the backward pass in {self.pack_activations} bits")
        return "\n".join(lines)


def device_of(layer: nn.Module, model: nn.Module) -> torch.device:
    """Return where a layer computes: where its parameters are, or, as it has none, the first ones of its model.

    >>> device_of(Matmul(), nn.Sequential(Matmul(), nn.Linear(2, 2, device="meta")))
    device(type='meta')
    """
    own, all_of_them = next(layer.parameters(), None), next(model.parameters(), None)
    parameter = own if own is not None else all_of_them
    return torch.device("cpu") if parameter is None else parameter.device


def _backend(layer: Any, device: str) -> str:
    """Return what computes a layer's products: one name, or one for each product where they differ."""
    compute = layer.assignment.compute
    names = {}
    for product in PRODUCTS:
        if getattr(layer.assignment.recipe, product) is not None:
            names[product] = choose(*_request(layer, product, device), compute).backend
    if len(set(names.values())) == 1:
        return next(iter(names.values()))
    return ", ".join(f"{product} {name}" for product, name in names.items())


def _request(layer: Any, product: str, device: str) -> tuple[str, Request]:
    """Return what is asked of the kernels: for the shapes of the last call, or for none in particular."""
    if layer.assignment.shapes is not None:
        shapes, size = layer.assignment.shapes
        a, b = (torch.empty(shapes[role], dtype=torch.int8, device="meta") for role in OPERANDS[product])
        op, request = layer.products(size).request(product, a, b)
        return op, replace(request, device=device)
    spatial, groups = len(getattr(layer, "kernel_size", ())), int(getattr(layer, "groups", 1))
    swap = {"output": "grad_input", "grad_input": "output", "grad_weight": "grad_weight"}
    turned = swap[product] if getattr(layer, "transposed", False) else product
    return (f"conv_{turned}" if spatial else "matmul"), Request(device, 0, spatial, groups)


def _bits(recipe: Any, product: str) -> str:
    operands = [q for p, _, q in recipe.operands() if p == product]
    return "×".join("+".join([str(q.bits)] * q.grid.digits) for q in operands) or "float"


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that a report lists: those with a product of their own."""
    own = (*QUANTIZED_CLASSES, Matmul, ScaledDotProductAttention)
    for name, module in model.named_modules():
        direct = bool(next(module.parameters(recurse=False), None) is not None)
        is_norm = "Norm" in type(module).__name__
        # parts of the layer above them
        inner = isinstance(module, (QuantizerStates, nn.utils.parametrize.ParametrizationList))
        if isinstance(module, (Quantized, *own)) or (direct and not is_norm and not inner):
            yield name, module


def report(model: nn.Module, inputs: Sequence[Any] | None = None) -> Report:
    """Return what is quantized in ``model`` and why the rest is not.

    Args:
        model: any module, before or after ``quantize_``.
        inputs: a tuple of what ``model`` takes. With it, every quantized layer is timed forward and backward, as it is
            and in float, on what it gets from this input: the report says where quantizing does not pay. The numbers
            of a layer never depend on what computes it, so such layers stay quantized until a rule leaves them out.

    >>> import gradbits as gb
    >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Embedding(3, 8))
    >>> _ = gb.quantize_(net, "int8_dynamic")
    >>> [(r.name, r.recipe, r.reason) for r in gb.report(net).rows]
    [('0', 'int8_dynamic', ''), ('2', 'float', 'Embedding has no product to quantize')]
    """
    check_module(model)
    speeds = {} if inputs is None else layer_speeds(model, inputs)
    rows = []
    for name, module in named_layers(model):
        if isinstance(module, QuantizedAttention):
            backend = module.kernel("attention", device_of(module, model).type).backend
            kind, follows = module.float_class.__name__, module.assignment.recipe.name
            rows.append(Row(name, kind, follows, *ATTENTION_BITS, backend, "", speeds.get(name)))
        elif isinstance(module, Quantized):
            recipe = module.assignment.recipe
            output, grad_input, grad_weight = (_bits(recipe, p) for p in PRODUCTS)
            kind = module.float_class.__name__
            bits, speed = (output, grad_input, grad_weight), speeds.get(name)
            rows.append(Row(name, kind, recipe.name, *bits, _backend(module, device_of(module, model).type), "", speed))
        else:
            given = getattr(module, "_gradbits_reason", None)
            reason = str(given or why_not_supported(module) or "quantize_ was not asked to")
            rows.append(Row(name, type(module).__name__, "float", "float", "float", "float", "torch", reason))
    return Report(tuple(rows), packing_of(model), fused(model))


def why_not_supported(module: nn.Module) -> str | None:
    """Return why a module's class cannot be quantized, or None where it can."""
    kind = type(module)
    if kind in (*QUANTIZED_CLASSES, ScaledDotProductAttention) or isinstance(module, Assigned):
        return None
    if hasattr(module, "parametrizations"):
        return "its weight is parametrized; remove the parametrization first"
    for base in (*QUANTIZED_CLASSES, ScaledDotProductAttention):
        if isinstance(module, base):
            return f"{kind.__name__} is a subclass of {base.__name__} that may compute something else"
    if isinstance(module, nn.MultiheadAttention):
        return (
            "MultiheadAttention multiplies its own weights; build attention from Linear and "
            "gradbits.nn.ScaledDotProductAttention or Matmul"
        )
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase, nn.Bilinear)):
        return f"{kind.__name__} multiplies its own weights, which is not supported"
    return f"{kind.__name__} has no product to quantize"
