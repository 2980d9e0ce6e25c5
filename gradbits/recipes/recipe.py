"""Recipes: which quantizer serves which operand of the three products."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any

from gradbits.core.checks import check_choice, check_instance, check_integer
from gradbits.core.errors import ArgumentError, DtypeError, GradbitsError, ScaleAxisError
from gradbits.core.grain import PerBlock, PerChannel, PerTensor
from gradbits.core.spec import Spec
from gradbits.quantizers.grids import Grid
from gradbits.quantizers.leverage import Leverage
from gradbits.quantizers.quantizer import Quantizer
from gradbits.recipes.learning import HessianScaling, QuantizerLearning

KEEP_FLOAT = ("first_conv", "last_linear")
# axis along which an operand's scale may vary, because it is an axis of the product's result:
# input and gradient are [rows (samples, tokens), channels, ...], a weight is [output channels, input channels, ...]
LEGAL_AXIS = {
    ("output", "input"): 0,
    ("output", "weight"): 0,
    ("grad_input", "gradient"): 0,
    ("grad_input", "weight"): 1,
    ("grad_weight", "gradient"): 1,
    ("grad_weight", "input"): 1,
}


@dataclass(frozen=True, kw_only=True)
class Product(Spec):
    """The operands of one product; the base of the three."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name == "sampling":
                check_instance(getattr(self, field.name), field.name, Leverage, None)
            else:
                check_instance(getattr(self, field.name), field.name, Quantizer)


@dataclass(frozen=True, kw_only=True)
class Output(Product):
    """The operands of ``output`` = input · weightᵀ."""

    input: Quantizer
    weight: Quantizer


@dataclass(frozen=True, kw_only=True)
class GradInput(Product):
    """The operands of ``grad_input`` = gradient · weight, and how its rows are sampled, if they are."""

    gradient: Quantizer
    weight: Quantizer
    sampling: Leverage | None = None


@dataclass(frozen=True, kw_only=True)
class GradWeight(Product):
    """The operands of ``grad_weight`` = gradientᵀ · input, and how its rows are sampled, if they are."""

    gradient: Quantizer
    input: Quantizer
    sampling: Leverage | None = None


@dataclass(frozen=True, kw_only=True)
class LayerLearningRate(Spec):
    r"""Deviation-counteractive learning rate scaling: :math:`\phi(d) = \max(e^{-\alpha d}, \beta)` per layer.

    Args:
        alpha: ``α``.
        beta: ``β``, the floor.

    References:
        Zhu et al., CVPR 2020, arXiv:1912.12607.
    """

    alpha: float = 20.0
    beta: float = 0.1


@dataclass(frozen=True, kw_only=True)
class QAT(Spec):
    """Quantize the whole graph as integer-only inference will run it: additions, concatenations, folded batch norms.

    Args:
        delay: training steps before activations are quantized; their ranges are followed from the first step.
        freeze: training step from which batch norms use their running statistics instead of the batch's; None: never.
        rounding: how sums become codes in evaluation and after ``convert_``: ``"single"`` rounds once, ``"double"``
            twice, as gemmlowp does.
    """

    delay: int = 0
    freeze: int | None = None
    rounding: str = "single"

    def __post_init__(self) -> None:
        check_integer(self.delay, "QAT.delay", 0)
        if self.freeze is not None:
            check_integer(self.freeze, "QAT.freeze", 0)
        check_choice(self.rounding, "QAT.rounding", ("single", "double"))


@dataclass(frozen=True, kw_only=True)
class Recipe(Spec):
    """How a layer's three products are computed; a product that is None stays in float.

    Args:
        name: what reports call it.
        output, grad_input, grad_weight: the quantizers of each product's operands.
        share_gradient: whether one draw of gradient codes serves both backward products where their quantizers are
            equal (one pass less over the gradient); otherwise each product draws its own noise.
        keep_float: layers left in float by their place in the model: ``"first_conv"``, ``"last_linear"``.
        matmul: what attention products (``gradbits.nn.Matmul``) take: True for this recipe, False for float, or a
            recipe of their own.
        attention: whether fused attention (``gradbits.nn.ScaledDotProductAttention``) multiplies 8-bit codes, the way
            ``gradbits.kernels.attention`` says; its operands do not follow the quantizers above.
        learning_rate: what the recipe asks of the optimizer, see ``gradbits.optim.attach_companion_``.
        qat: whether and how the graph around the layers is quantized too, so that ``convert_`` can follow.

    Raises:
        ScaleAxisError: an operand's scale varies along the axis that its product sums over.
        ArgumentError: a range per row remembers, or a field is not legal.

    >>> from gradbits.core.grain import PerRow
    >>> q = Quantizer()
    >>> Recipe(name="mine", grad_weight=GradWeight(gradient=Quantizer(grain=PerRow()), input=q))
    Traceback (most recent call last):
    ...
    gradbits.core.errors.ScaleAxisError: grad_weight.gradient.grain=PerRow(axis=0): grad_weight sums over that axis, \
so its scale cannot leave the integer product; legal are PerTensor() and PerChannel(axis=1)
    """

    name: str
    output: Output | None = None
    grad_input: GradInput | None = None
    grad_weight: GradWeight | None = None
    share_gradient: bool = False
    keep_float: tuple[str, ...] = ()
    matmul: bool | Recipe = True
    attention: bool = False
    learning_rate: LayerLearningRate | None = None
    qat: QAT | None = None
    quantizer_learning: QuantizerLearning | None = None
    hessian: HessianScaling | None = None

    def __post_init__(self) -> None:
        if not check_instance(self.name, "name", str):
            raise ArgumentError("name='': must not be empty")
        for product, kind in {"output": Output, "grad_input": GradInput, "grad_weight": GradWeight}.items():
            check_instance(getattr(self, product), product, kind, None)
        check_instance(self.share_gradient, "share_gradient", bool)
        check_instance(self.matmul, "matmul", bool, Recipe)
        check_instance(self.attention, "attention", bool)
        check_instance(self.learning_rate, "learning_rate", LayerLearningRate, None)
        check_instance(self.quantizer_learning, "quantizer_learning", QuantizerLearning, None)
        check_instance(self.hessian, "hessian", HessianScaling, None)
        check_instance(self.qat, "qat", QAT, None)
        for role in check_instance(self.keep_float, "keep_float", tuple):
            check_choice(role, "keep_float", KEEP_FLOAT)
        for product, role, quantizer in self.operands():
            _check_axis(product, role, quantizer)
            _check_memory(product, role, quantizer)
        _check_rotations(self)

    def operands(self) -> Iterator[tuple[str, str, Quantizer]]:
        """Yield (product, role, quantizer) for every quantized operand."""
        for product in ("output", "grad_input", "grad_weight"):
            spec = getattr(self, product)
            if spec is not None:
                for field in fields(spec):
                    operand = getattr(spec, field.name)
                    if isinstance(operand, Quantizer):
                        yield product, field.name, operand

    @cached_property
    def by_operand(self) -> dict[tuple[str, str], Quantizer]:
        """The quantizer of every quantized operand by (product, role)."""
        return {(product, role): q for product, role, q in self.operands()}

    @cached_property
    def is_stochastic(self) -> bool:
        """Whether any operand draws noise."""
        sampled = any(getattr(spec, "sampling", None) for spec in (self.grad_input, self.grad_weight))
        return sampled or any(q.is_stochastic for _, _, q in self.operands())

    def with_overrides(self, overrides: Mapping[str, Any]) -> Recipe:
        """Return the recipe with some fields replaced.

        A path names a field (``keep_float``), an operand's field in one product (``grad_input.gradient.bits``) or in
        every product (``gradient.bits``); ``bits`` is short for ``grid.bits``. A string value is read as JSON where it
        is JSON.

        Raises:
            ArgumentError: no such path, or an illegal value.

        >>> from gradbits.recipes import recipe
        >>> recipe("int8_dynamic").with_overrides({"gradient.bits": "5"}).grad_input.gradient.bits
        5
        """
        if not isinstance(overrides, Mapping) or not all(isinstance(path, str) for path in overrides):
            raise DtypeError(f"overrides={overrides!r}: must map paths such as 'gradient.bits' to values")
        result: Recipe = self
        for path, value in overrides.items():
            result = _override(result, path, parse_value(value))
        return result


def _check_axis(product: str, role: str, quantizer: Quantizer) -> None:
    grain, axis = quantizer.grain, LEGAL_AXIS[product, role]
    if isinstance(grain, PerTensor) or (isinstance(grain, PerChannel) and grain.axis == axis):
        return
    legal = "PerRow()" if axis == 0 and role != "weight" else f"PerChannel(axis={axis})"
    why = "blocks run along" if isinstance(grain, PerBlock) else f"{product} sums over"
    raise ScaleAxisError(
        f"{product}.{role}.grain={grain}: {why} that axis, so its scale cannot leave the integer product; "
        f"legal are PerTensor() and {legal}"
    )


def _check_memory(product: str, role: str, quantizer: Quantizer) -> None:
    """Refuse a state for each row: the rows of two batches have nothing in common, not even their number."""
    by_row = role != "weight" and isinstance(quantizer.grain, PerChannel) and quantizer.grain.axis == 0
    one, two = (quantizer.range.init_state(groups) for groups in (1, 2))
    if by_row and any(one[name].shape != two[name].shape for name in one):
        raise ArgumentError(
            f"{product}.{role}.range={quantizer.range}: remembers a range for each row, but the rows change with every "
            "batch; legal are rules that look at one batch, or the grain PerTensor()"
        )


def _check_rotations(recipe: Recipe) -> None:
    """Refuse a rotation along a contracted axis, unless it is orthogonal and both operands share it."""
    for product, role, q in recipe.operands():
        if role != "gradient" and q.rotation is not None and not q.rotation.orthogonal and q.range.can_clip:
            raise ArgumentError(
                f"{product}.{role}.rotation={q.rotation}: with a range that clips, the rotation of an operand of the "
                "forward pass must be orthogonal"
            )
    rotations = {(product, role): q.rotation for product, role, q in recipe.operands()}
    for (product, role), rotation in rotations.items():
        if rotation is None or rotation.axis == LEGAL_AXIS[product, role]:
            continue
        (other,) = (r for p, r in rotations if p == product and r != role)
        if not (rotation.orthogonal and rotations[product, other] == rotation):
            raise ScaleAxisError(
                f"{product}.{role}.rotation={rotation}: {product} sums over axis {rotation.axis}, so the rotation must "
                f"be orthogonal and {product}.{other} must have the same; that one has {rotations[product, other]}"
            )


def parse_value(value: Any) -> Any:
    """Return what a string stands for where it is JSON, lists as tuples; anything else as it is.

    >>> parse_value("[1, 2]"), parse_value("max"), parse_value(3)
    ((1, 2), 'max', 3)
    """
    if not isinstance(value, str):
        return value
    try:
        value = json.loads(value)
    except json.JSONDecodeError:
        return value
    return tuple(value) if isinstance(value, list) else value


def _override(recipe: Recipe, path: str, value: Any) -> Recipe:
    head, _, rest = path.partition(".")
    products = [p for p in ("output", "grad_input", "grad_weight") if getattr(recipe, p) is not None]
    if head in ("input", "weight", "gradient") and rest:
        holders = {p: getattr(recipe, p) for p in products if hasattr(getattr(recipe, p), head)}
        changed = {p: _set(holder, path, value, path) for p, holder in holders.items()}
        if not changed:
            raise ArgumentError(f"{path}={value!r}: recipe {recipe.name!r} does not quantize {head}")
        return replace(recipe, **changed)
    return _set(recipe, path, value, path)


def _set(spec: Any, path: str, value: Any, whole: str) -> Any:
    head, _, rest = path.partition(".")
    if isinstance(spec, Quantizer) and head == "bits":
        head, rest = "grid", f"bits.{rest}" if rest else "bits"
    names = [f.name for f in fields(spec)] if is_dataclass(spec) else []
    if head not in names:
        legal = ", ".join(names) or "nothing: it is None in this recipe"
        raise ArgumentError(f"{whole}={value!r}: {type(spec).__name__} has no {head!r}; legal are {legal}")
    current = getattr(spec, head)
    if not rest and isinstance(current, Grid) and not isinstance(value, Spec):
        raise ArgumentError(f"{whole}={value!r}: set one of its fields, for example {whole}.bits")
    if rest and not isinstance(current, Spec):
        raise ArgumentError(f"{whole}={value!r}: {head} has no parts")
    new = _set(current, rest, value, whole) if rest else value
    try:
        return replace(spec, **{head: new})
    except GradbitsError as error:
        # the spec names its own field; whoever set it knows the path only
        own = rf"({type(spec).__name__}\.)?{head}=.*?: (?=must )"
        if rest or not re.match(own, str(error), re.DOTALL):
            raise
        raise type(error)(f"{whole}={value!r}: {re.sub(own, '', str(error), count=1, flags=re.DOTALL)}") from None
    except TypeError as error:
        raise ArgumentError(f"{whole}={value!r}: {error}") from None
