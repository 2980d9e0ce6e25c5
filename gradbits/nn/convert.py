"""``quantize_`` and ``dequantize_``: layers change their class in place, everything that refers to them stays."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from gradbits.core.checks import check_bits, check_choice, check_module
from gradbits.core.errors import ArgumentError, DtypeError, FallbackError, NothingToQuantizeError
from gradbits.kernels.dispatch import COMPUTE
from gradbits.nn.assigned import Assigned
from gradbits.nn.assignment import Assignment
from gradbits.nn.attention import ScaledDotProductAttention
from gradbits.nn.compiled import register
from gradbits.nn.function import ON_NONFINITE
from gradbits.nn.graph import trace
from gradbits.nn.layers import QUANTIZED_CLASSES
from gradbits.nn.matmul import Matmul
from gradbits.nn.packing import set_packing
from gradbits.nn.qat import follow_graph_, leave_graph_
from gradbits.nn.quantized import Quantized, init_states, spatial_example
from gradbits.nn.quantized_attention import QuantizedAttention
from gradbits.nn.report import Report, device_of, named_layers, report, why_not_supported
from gradbits.recipes import Recipe, recipe

MULTIPLY_THEMSELVES = (*QUANTIZED_CLASSES, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Bilinear)
Rules = str | Recipe | Mapping[str, "str | Recipe | None"]


def quantize_(
    model: nn.Module,
    rules: Rules,
    *,
    compute: str = "auto",
    strict: bool = False,
    on_nonfinite: str = "propagate",
    pack_activations: int | None = None,
) -> Report:
    """Make the layers of ``model`` follow a recipe; parameters keep their names, shapes and dtypes.

    Calling it again with the same rules changes nothing; with others, the layers follow the new ones.

    Args:
        model: changed in place.
        rules: a recipe, its name, or rules from name patterns to recipes: ``{"*.head": None, "*": "int8_dynamic"}``.
            The first pattern that matches a layer's name decides, None leaves it in float.
        compute: ``"integer"`` multiplies integers, ``"simulate"`` the same codes in float64, ``"auto"`` takes the
            faster; the results are equal bit for bit.
        strict: whether a layer that could not follow its recipe is an error.
        on_nonfinite: what a NaN or Inf in an operand does: ``"propagate"`` to the result, ``"raise"``, or ``"skip"``
            (a gradient that is not finite gives zero gradients, with a warning). States stay untouched in any case.
        pack_activations: bits, 2 to 8, of everything large that forward passes of ``model`` keep for the backward pass,
            as within ``gradbits.pack_activations(bits)``; None keeps it as it is.

    Returns:
        What was quantized and what was not, with reasons; ``report(model)`` gives the same later.

    Raises:
        NothingToQuantizeError: no layer would be quantized.
        FallbackError: with ``strict``, a layer was left in float that the rules do not name None and the recipe does
            not keep.
        ArgumentError: an unknown recipe, a pattern that is no string, an illegal option.
        GraphError: the recipe quantizes the whole graph, as ``qat_int8`` does, and the model cannot be traced.

    >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> len(quantize_(net, {"2": None, "*": "int8_dynamic"}).quantized)
    1
    """
    check_module(model)
    if not isinstance(strict, bool):
        raise DtypeError(f"strict={strict!r}: must be True or False")
    check_choice(compute, "compute", COMPUTE)
    check_choice(on_nonfinite, "on_nonfinite", ON_NONFINITE)
    if pack_activations is not None:
        check_bits(pack_activations, "pack_activations")
    patterns = _patterns(rules)
    layers = list(named_layers(model))
    roles = _roles(layers)
    plan: list[tuple[str, nn.Module, Recipe | None, str, bool]] = []
    matches = [_match(name, patterns) for name, _ in layers]
    for (name, module), (wanted, pattern) in zip(layers, matches, strict=True):
        chosen, reason, fell_back = _decide(module, wanted, roles.get(name, ()), pattern)
        plan.append((name, module, chosen, reason, fell_back))
    if not any(chosen for _, _, chosen, _, _ in plan):
        why = "; ".join(f"{name or '(root)'}: {reason}" for name, _, _, reason, _ in plan[:8])
        asked = {p: r.name if r is not None else None for p, r in patterns}
        raise NothingToQuantizeError(f"rules={asked!r} would quantize no layer. {why or 'The model has no layers.'}")
    decided = {pattern for _, pattern in matches}
    idle = [pattern for pattern, _ in patterns if pattern not in decided]
    if idle:
        text = f"rules: pattern {idle[0]!r} decides for no layer: no name matches, or earlier patterns take them all"
        if strict:
            raise FallbackError(f"strict=True: {text}")
        warnings.warn(text, UserWarning, stacklevel=2)
    fallen = [(name, reason) for name, _, _, reason, fell_back in plan if fell_back]
    if strict and fallen:
        raise FallbackError("strict=True: " + "; ".join(f"{name}: {reason}" for name, reason in fallen))
    if any(chosen is not None and chosen.qat is not None for _, _, chosen, _, _ in plan):
        trace(model)  # a model whose graph cannot be followed is refused before anything changes
    for name, module, chosen, reason, _ in plan:
        if chosen is None:
            _to_float(module)
            module._gradbits_reason = reason  # type: ignore[assignment]
        else:
            _assign(module, name, chosen, compute, on_nonfinite, device_of(module, model))
    follow_graph_(model, compute)
    _set_fast_paths(model)
    set_packing(model, pack_activations)
    return report(model)


def dequantize_(model: nn.Module) -> None:
    """Turn every quantized layer of ``model`` back into its float class; quantizer states are dropped.

    >>> net = nn.Linear(4, 4)
    >>> _ = quantize_(net, "int8_dynamic"); dequantize_(net); type(net).__name__
    'Linear'
    """
    check_module(model)
    leave_graph_(model)
    for module in model.modules():
        _to_float(module)
    _set_fast_paths(model)
    set_packing(model, None)


def _set_fast_paths(model: nn.Module) -> None:
    """Keep PyTorch's fused inference path for encoders from reading the weights of quantized layers past them."""
    for module in model.modules():
        kept = module.__dict__.get("_gradbits_fast_path")
        quantized = any(isinstance(m, Quantized) for m in module.modules())
        name = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}.get(
            type(module)
        )
        if name is None or not hasattr(module, name) or quantized == (kept is not None):
            continue
        if quantized:  # both flags are read by the fused path only
            module.__dict__["_gradbits_fast_path"] = (getattr(module, name),)
            module.__dict__[name] = 0
        elif kept is not None:
            module.__dict__[name] = kept[0]
            del module.__dict__["_gradbits_fast_path"]


def _patterns(rules: Rules) -> list[tuple[str, Recipe | None]]:
    if isinstance(rules, (str, Recipe)):
        rules = {"*": rules}
    if not isinstance(rules, Mapping):
        raise DtypeError(f"rules={rules!r}: must be a recipe, its name, or a dict from name patterns to those or None")
    result: list[tuple[str, Recipe | None]] = []
    for pattern, value in rules.items():
        if not isinstance(pattern, str):
            raise ArgumentError(f"rules: pattern {pattern!r} must be a string such as 'layers.0.*'")
        if value is not None and not isinstance(value, (str, Recipe)):
            raise DtypeError(f"rules[{pattern!r}]={value!r}: must be a recipe, its name, or None")
        result.append((pattern, recipe(value) if isinstance(value, str) else value))
    return result


def _match(name: str, patterns: list[tuple[str, Recipe | None]]) -> tuple[Recipe | None, str | None]:
    for pattern, value in patterns:
        if fnmatchcase(name, pattern):
            return value, pattern
    return None, None


def _roles(layers: list[tuple[str, nn.Module]]) -> dict[str, tuple[str, ...]]:
    """Return which layers are the first convolution and the last linear layer."""
    convs = [name for name, m in layers if isinstance(m, nn.modules.conv._ConvNd)]
    linears = [name for name, m in layers if isinstance(m, nn.Linear)]
    roles: dict[str, tuple[str, ...]] = {}
    if convs:
        roles[convs[0]] = ("first_conv",)
    if linears:
        roles[linears[-1]] = (*roles.get(linears[-1], ()), "last_linear")
    return roles


def _decide(
    module: nn.Module, wanted: Recipe | None, roles: tuple[str, ...], pattern: str | None
) -> tuple[Recipe | None, str, bool]:
    """Return (recipe or None, reason for float, whether it is a fallback that strict refuses)."""
    if pattern is None:
        return None, "no rule matches its name", False
    if wanted is None:
        return None, f"rule {pattern!r} leaves it in float", False
    unsupported = why_not_supported(module)
    if unsupported is not None:
        return None, unsupported, isinstance(module, MULTIPLY_THEMSELVES)
    for role in roles:
        if role in wanted.keep_float:
            return None, f"recipe {wanted.name!r} keeps the {role.replace('_', ' ')} in float (keep_float)", False
    if isinstance(module, ScaledDotProductAttention):
        if wanted.attention:
            return wanted, "", False
        return None, f"recipe {wanted.name!r} leaves attention in float (attention=False)", False
    if isinstance(module, Matmul):
        if wanted.matmul is False:
            return None, f"recipe {wanted.name!r} leaves attention products in float (matmul=False)", False
        wanted = wanted.matmul if isinstance(wanted.matmul, Recipe) else wanted
    reason = _layer_reason(module, wanted)
    return (None, reason, True) if reason else (wanted, "", False)


def _layer_reason(module: nn.Module, wanted: Recipe) -> str | None:
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters(recurse=False)):
        return "its parameters have no shape yet; run one batch before quantize_"
    if any(not p.dtype.is_floating_point for p in module.parameters(recurse=False)):
        return "its weight is not floating-point"
    if getattr(module, "transposed", False):
        extra, stride = getattr(module, "output_padding", ()), getattr(module, "stride", ())
        if any(e >= s for e, s in zip(extra, stride, strict=True)):
            return f"output_padding={extra} is not below stride={stride}"
    kind: Any = QUANTIZED_CLASSES.get(type(module), type(module))
    return kind.products(module, spatial_example(module)).why_not(wanted)


def _assign(
    module: Any, name: str, chosen: Recipe, compute: str, on_nonfinite: str, device: torch.device
) -> None:
    if isinstance(module, Assigned) and module.assignment.recipe == chosen:
        module.assignment.compute, module.assignment.on_nonfinite = compute, on_nonfinite
        module.assignment.name = name
        return
    _to_float(module)
    attends = type(module) is ScaledDotProductAttention
    module.__class__ = QuantizedAttention if attends else QUANTIZED_CLASSES[type(module)]
    module.__dict__.pop("_gradbits_reason", None)
    module.assignment = Assignment(name, chosen, compute, on_nonfinite)
    if attends:
        register(module)
        return
    states, slots = init_states(module, chosen)
    module.assignment.slots = slots
    if states is not None:
        module.quantizers = states.to(device)
        module.assignment.learns = any(True for _ in states.parameters())
    register(module)


def _to_float(module: Any) -> None:
    if isinstance(module, Assigned):
        module.__class__ = module.float_class  # type: ignore[assignment]
        del module.assignment
        if hasattr(module, "quantizers"):
            del module.quantizers
