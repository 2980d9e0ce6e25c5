"""From a model in quantization-aware training to integers: scales become multipliers, biases int32."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from gradbits.core.errors import ArgumentError, GraphError
from gradbits.kernels.fixed_point import Multiplier, common_multipliers
from gradbits.nn.fold import fold
from gradbits.nn.graph import (
    MAX_POOL_FUNCTIONS,
    TRANSPOSED,
    Step,
    activation_bounds,
    max_pool_of,
    mean_axes,
    operands,
    output_nodes,
    source_of,
    window_of,
)
from gradbits.nn.integer import (
    Clamp,
    Codes,
    Dequantize,
    IntegerCat,
    IntegerLayer,
    IntegerMean,
    IntegerSum,
    Quantize,
    Shape,
)
from gradbits.nn.integer_model import Apply, IntegerModel, Pad, Ref
from gradbits.quantizers.quantizer import Quantizer

if TYPE_CHECKING:
    from gradbits.nn.qat import GraphForward

TERMS = 65_536  # 255 * 127 * TERMS < 2^31: an int32 holds every sum with the zero point taken off, and the bias
BIAS = 1 << 29  # the largest int32 bias


def why_not_integer(forward: GraphForward) -> str | None:
    """Return why a model cannot compute in integers alone, or None."""
    plan = forward.plan
    if left := plan.left_in_float:
        shown = "; ".join(f"{step.node.name}: {step.why}" for step in left[:5])
        return f"{len(left)} steps have no integer form ({shown})"
    for step in plan.steps.values():
        if step.kind == "layer":
            layer = forward.model.get_submodule(str(step.head.target))
            norm = None if step.norm is None else forward.model.get_submodule(step.norm)
            if reason := _layer_reason(layer) or _not_finite(layer, norm, step.norm):
                return f"layer {step.head.target!r}: {reason}"
    waiting = [node.name for node in plan.sources if not forward.is_started(node)]
    if waiting:
        return f"the ranges of {', '.join(waiting[:5])} are not known; train some steps, or load a trained state"
    for node in output_nodes(next(s for s in plan.steps.values() if s.kind == "output").node.args[0]):
        source = source_of(plan, node)
        if source not in plan.sources and plan.steps[source].kind != "layer":
            return f"{source.name} is returned as it came in"
    return None


def _layer_reason(layer: Any) -> str | None:
    if isinstance(layer, TRANSPOSED):
        return "transposed convolutions have no integer form"
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return f"padding_mode={layer.padding_mode!r} has no integer form"
    terms = layer.weight[:1].numel()
    return f"{terms} products in a sum could overflow int32" if terms > TERMS else None


@torch.no_grad()
def _not_finite(layer: Any, norm: Any, path: str | None) -> str | None:
    """Return which numbers of a layer or of its folded norm are not finite, or None."""
    named = [("weight", layer.weight), ("bias", layer.bias)]
    if norm is not None:
        whose = f"of its batch norm {path!r}"
        named += [(f"{key} {whose}", getattr(norm, key)) for key in ("weight", "bias", "running_mean", "running_var")]
    for name, tensor in named:
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            return f"{name} is not finite; must be, to become integers"
    if norm is not None:
        for tensor in fold(norm, layer.weight.float(), None if layer.bias is None else layer.bias.float()):
            if not bool(torch.isfinite(tensor).all()):
                return f"its weight with the running statistics {whose} folded in is not finite; must be"
    return None


@torch.no_grad()
def build(forward: GraphForward) -> IntegerModel:
    """Return the integer model of a model in quantization-aware training, with the ranges that it has now.

    Raises:
        GraphError: it cannot compute in integers alone.
    """
    if reason := why_not_integer(forward):
        raise GraphError(f"model: cannot be converted to integers: {reason}")
    return _Builder(forward).run()


class _Builder:
    """Goes along the plan once and collects the operations."""

    def __init__(self, forward: GraphForward) -> None:
        self.forward, self.plan, self.model = forward, forward.plan, forward.model
        self.operations: list[tuple[str, nn.Module, tuple[str, ...]]] = []
        self.name_of: dict[Node, str] = {}
        self.codes = {node: self._codes(node) for node in self.plan.sources}

    def run(self) -> IntegerModel:
        inputs: list[Node] = []
        for step in self.plan.steps.values():
            if step.kind == "output":
                return self._finish(step, inputs)
            if step.kind == "input":
                inputs.append(step.node)
            try:
                getattr(self, f"_{step.kind}")(step)
            except ArgumentError as error:  # a scale that fixed-point numbers cannot express
                name = step.head.target if step.kind == "layer" else step.head.name
                raise GraphError(
                    f"model: cannot be converted to integers: {step.kind} {name!r}: its scale over that of its "
                    f"result: {error}; a weight, a bias or a range is out of all proportion"
                ) from error
        raise GraphError("model: returns nothing")

    def _placed(self, node: Node) -> tuple[Quantizer, Any]:
        quantizer, state = self.forward.quantizer(node), self.forward.state(node)
        return quantizer, quantizer.grid.place(state["low"].cpu(), state["high"].cpu())

    def _codes(self, node: Node) -> Codes:
        """Return what the codes of a quantized value mean; a range of zero width holds the code of zero alone."""
        quantizer, placed = self._placed(node)
        zero, scale = int(placed.zero_point), float(placed.scale)
        if scale == 0.0:
            return Codes(1.0, zero, zero, zero)
        return Codes(scale, zero, *quantizer.grid.levels)

    def _bounded(self, step: Step) -> Codes:
        """Return the codes of a step's result within the bounds of its activation."""
        codes = self.codes[step.node]
        low, high = step.bounds

        def code(value: float) -> int:
            return min(max(codes.zero + round(value / codes.scale), codes.low), codes.high)

        return replace(
            codes, low=codes.low if low is None else code(low), high=codes.high if high is None else code(high)
        )

    def _append(self, name: str, operation: nn.Module, *sources: str) -> None:
        self.operations.append((name, operation, sources))

    def _input(self, step: Step) -> None:
        node = step.node
        self.name_of[node] = str(node.target)
        if node in self.codes:
            _, placed = self._placed(node)
            self.name_of[node] = f"{node.name}_codes"
            self._append(self.name_of[node], Quantize(self.codes[node], placed.code_map.inverse), str(node.target))

    def _layer(self, step: Step) -> None:
        layer: Any = self.model.get_submodule(str(step.head.target))
        node = operands(step)[0]
        source = self.codes[source_of(self.plan, node)]
        weight, bias = layer.weight.detach().float(), None if layer.bias is None else layer.bias.detach().float()
        if step.norm is not None:
            weight, bias = fold(self.model.get_submodule(step.norm), weight, bias)
        codes, steps = _weight_codes(layer.weight_quantizer(), weight, bias, source.scale)
        sums = source.scale * steps  # float64: the scale of the sums, one for each output channel
        integers = torch.zeros(len(sums), dtype=torch.int64) if bias is None else torch.round(bias.double() / sums)
        whole = integers.clamp(-BIAS, BIAS).to(torch.int32)
        name = step.head.name
        last = step.node not in self.codes
        target = None if last else self._bounded(step)
        multiplier = None if target is None else Multiplier.of(sums / target.scale)
        limits = tuple(_limit(value, sums) for value in step.bounds) if last else (None, None)
        operation = IntegerLayer(
            codes,
            steps,
            whole,
            _shape(layer, step.norm is not None),
            source.zero,
            target,
            multiplier,
            limits,  # type: ignore[arg-type]
            self.forward.rules.rounding,
            self.forward.compute,
        )
        self.name_of[step.node] = name
        self._append(name, operation, self.name_of[node])
        if last:
            shape = (-1, *(1,) * operation.shape.spatial)
            self._append(f"{name}_real", Dequantize(sums.float().view(shape)), name)
            self.name_of[step.node] = f"{name}_real"

    def _sum(self, nodes: list[Node], target: Codes) -> IntegerSum:
        sources = [self.codes[source_of(self.plan, node)] for node in nodes]
        factors, shift = common_multipliers([source.scale / target.scale for source in sources])
        return IntegerSum(tuple(source.zero for source in sources), tuple(factors), shift, target)

    def _add(self, step: Step) -> None:
        nodes = operands(step)
        self.name_of[step.node] = step.head.name
        self._append(step.head.name, self._sum(nodes, self._bounded(step)), *(self.name_of[node] for node in nodes))

    def _cat(self, step: Step) -> None:
        nodes, node = operands(step), step.node
        axis: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        parts = [self._sum([each], self.codes[node]) for each in nodes]
        self.name_of[node] = node.name
        self._append(node.name, IntegerCat(parts, axis), *(self.name_of[each] for each in nodes))

    def _mean(self, step: Step) -> None:
        source, target = operands(step)[0], self.codes[step.node]
        given = self.codes[source_of(self.plan, source)]
        real = Multiplier.of(given.scale / target.scale)
        multiplier = (int(real.m0), int(real.shift))
        where = _averaged(step.node, self.model)
        self.name_of[step.node] = step.node.name
        self._append(step.node.name, IntegerMean(given.zero, multiplier, target, **where), self.name_of[source])

    def _shape(self, step: Step) -> None:
        self._passive(step)

    def _passive(self, step: Step) -> None:
        node = step.node
        name = self.name_of[node] = node.name
        source = source_of(self.plan, operands(step)[0]) if step.kind == "passive" else None
        codes = None if source is None else self.codes.get(source)
        bounds = activation_bounds(node, dict(self.model.named_modules()))
        if bounds is not None and codes is not None:
            self._append(name, Clamp(max(codes.zero, codes.low), codes.high), self.name_of[operands(step)[0]])
            return
        inputs = node.all_input_nodes
        args, kwargs = _referring(node.args, inputs), _referring(node.kwargs, inputs)
        if node.target is F.pad and codes is not None:
            self._append(name, Pad(args[:3], kwargs, codes.zero), *(self.name_of[n] for n in inputs))
            return
        target: Any = "reshape" if node.target == "view" else node.target  # codes may lie in another order in memory
        if node.target in MAX_POOL_FUNCTIONS:
            target, args, kwargs = max_pool_of(node), args[:1], {}
        elif node.op == "call_module":
            target = copy.deepcopy(self.model.get_submodule(str(node.target))).eval()
        self._append(name, Apply(target, args, kwargs), *(self.name_of[n] for n in inputs))

    def _finish(self, step: Step, inputs: list[Node]) -> IntegerModel:
        returned = list(dict.fromkeys(output_nodes(step.node.args[0])))
        for node in returned:
            codes = self.codes.get(source_of(self.plan, node))
            name = self.name_of[node]
            if codes is not None:
                real = f"{node.name}_real"
                self._append(real, Dequantize(torch.tensor(codes.scale, dtype=torch.float32), codes.zero), name)
                self.name_of[node] = real
        names = tuple(self.name_of[node] for node in returned)
        used = list(inputs)
        while used and used[-1].args and not used[-1].users:  # an option at the end that nothing reads
            used.pop()
        signature = tuple(str(n.target) for n in inputs), {str(n.target): n.args[0] for n in inputs if n.args}
        wanted = tuple(str(n.target) for n in used)
        return IntegerModel(wanted, self.operations, _referring(step.node.args[0], returned), names, signature)


def _referring(value: Any, nodes: list[Node]) -> Any:
    """Return arguments in ordinary containers, nodes replaced by references into ``nodes``."""
    if isinstance(value, Node):
        return Ref(nodes.index(value))
    if isinstance(value, dict):
        return {key: _referring(item, nodes) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_referring(item, nodes) for item in value)
    if isinstance(value, slice):
        return slice(*(_referring(item, nodes) for item in (value.start, value.stop, value.step)))
    return [_referring(item, nodes) for item in value] if isinstance(value, list) else value


def _weight_codes(
    quantizer: Quantizer, weight: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 codes of a weight and the float64 step of each output channel.

    A channel whose weights are zero, or so small that its bias would not fit into int32, takes a larger step.
    """
    q = quantizer.quantize(weight)
    steps = q.scale.double().reshape(-1).expand(weight.shape[0]).clone()
    largest = torch.zeros_like(steps) if bias is None else bias.double().abs()
    least = torch.where((steps == 0) & (largest == 0), 1.0, largest / (scale * BIAS))
    small = steps < least
    steps = torch.where(small, least, steps)
    codes = q.codes
    if bool(small.any()):
        finer = torch.round(weight.double() / steps.view(-1, *(1,) * (weight.dim() - 1)))
        codes = codes.clone()
        codes[small] = finer[small].to(torch.int8)
    return codes.contiguous(), steps


def _limit(value: float | None, sums: torch.Tensor) -> torch.Tensor | None:
    """Return a bound of real values as one of sums for each output channel."""
    if value is None:
        return None
    largest = float((1 << 31) - 1)
    return torch.round(value / sums).clamp(-largest, largest).to(torch.int64).clamp(-(1 << 31), (1 << 31) - 1).int()


def _shape(layer: Any, normed: bool) -> Shape:
    if isinstance(layer, nn.Linear):
        return Shape(normed=normed)
    padding = layer.padding
    if padding == "valid":
        pairs = tuple((0, 0) for _ in layer.kernel_size)
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        pairs = tuple((t // 2, t - t // 2) for t in total)
    else:
        pairs = tuple((p, p) for p in padding)
    return Shape(tuple(layer.stride), pairs, tuple(layer.dilation), layer.groups, normed)


def _averaged(node: Node, model: nn.Module) -> dict[str, Any]:
    """Return where a mean is taken, as arguments of ``IntegerMean``."""
    if node.op == "call_module":
        module: Any = model.get_submodule(str(node.target))
        if isinstance(module, nn.AvgPool2d):
            window, stride = (
                (n, n) if isinstance(n, int) else tuple(n) for n in (module.kernel_size, module.stride)
            )
            return {"axes": None, "window": window, "stride": stride}
        dims = {nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveAvgPool3d: 3}[type(module)]
        return {"axes": tuple(range(-dims, 0))}
    if node.target is F.avg_pool2d and (found := window_of(node)) is not None:
        return {"axes": None, "window": found[0], "stride": found[1]}
    axes = mean_axes(node) if node.target in (torch.mean, "mean") else None
    if axes is not None:
        keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
        return {"axes": axes, "keep": bool(keep)}
    dims = int(str(getattr(node.target, "__name__", ""))[-2])  # adaptive_avg_pool2d
    return {"axes": tuple(range(-dims, 0))}
