"""One call of a quantized layer: which operand is quantized how, with which state and which noise."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch

from gradbits.core.errors import NonFiniteError
from gradbits.core.noise import NoiseKey
from gradbits.core.qtensor import QTensor, Rotation
from gradbits.nn.bilinear import Bilinear
from gradbits.nn.kept_weights import keep_codes, kept_codes
from gradbits.nn.shared import Shared
from gradbits.quantizers.known import known_width, note_width
from gradbits.quantizers.quantizer import Quantizer
from gradbits.quantizers.ranges import State
from gradbits.recipes.recipe import Recipe

Seen = Callable[[str, str, torch.Tensor], None]  # layer, role and discretized tensor of what was computed
ON_NONFINITE = ("propagate", "raise", "skip")
# one stream per use: no two uses of a layer's tensors share noise
STREAMS = {
    ("output", "input"): 0,
    ("output", "weight"): 1,
    ("grad_input", "gradient"): 2,
    ("grad_input", "weight"): 3,
    ("grad_weight", "gradient"): 4,
    ("grad_weight", "input"): 5,
    ("grad_input", "sampling"): 6,
    ("grad_weight", "sampling"): 7,
}


@dataclass(frozen=True)
class Call:
    """Everything one call of a layer needs besides its tensors.

    Args:
        products: the layer's three products.
        recipe: which quantizer serves which operand.
        state_of: returns the state of an operand's quantizer.
        compute: ``"auto"``, ``"integer"`` or ``"simulate"``.
        seed: seed of this call's noise.
        update: whether the states of forward operands may change: in training, and not when a checkpoint recomputes.
        training: whether the states of gradients may change.
        on_nonfinite: what to do with NaN and Inf.
        name: the layer's name, for messages.
        dtype: dtype of the output.
        learned: (role, name) of each learned entry of the forward operands' states, in the order of the parameters.
        activation: what the kernel of ``output`` applies last; only where no gradient will be wanted.
    """

    products: Bilinear
    recipe: Recipe
    state_of: Callable[[str, str], State]
    compute: str
    seed: int
    update: bool
    training: bool
    on_nonfinite: str
    name: str
    dtype: torch.dtype
    learned: tuple[tuple[str, str], ...] = ()
    activation: str = ""

    def quantizer(self, product: str, role: str) -> Quantizer:
        """Return the quantizer of an operand, in this layer's own layout."""
        q = quantizer_of(self.recipe, product, role)
        grain = self.products.grain(role, q.grain)
        return q if grain is q.grain else replace(q, grain=grain)

    def key(self, product: str, use: str) -> NoiseKey:
        """Return the noise of one use of the layer's tensors."""
        return NoiseKey.of(self.seed, STREAMS[product, use])

    def quantize_forward(
        self, values: dict[str, torch.Tensor]
    ) -> dict[str, tuple[QTensor, torch.Tensor | None]]:
        """Return the codes of both operands of ``output``, and where their gradients pass."""
        qs = {role: self.quantizer("output", role) for role in values}
        states = {role: self.state_of("output", role) for role in values}
        rule = qs["input"].rotation
        if rule is not None and rule == qs["weight"].rotation:
            if not self.update:  # an evaluation before training settles for itself and leaves the layer unsettled
                states = {role: {name: t.clone() for name, t in state.items()} for role, state in states.items()}
            errors = [partial(self._error, qs[role], role, value) for role, value in values.items()]
            rule.settle(self.products.features(values["weight"]), errors, tuple(states.values()))
        return {
            role: self.quantize("output", role, value, self.update, states[role]) for role, value in values.items()
        }

    def started(self, values: dict[str, torch.Tensor], bias: torch.Tensor | None) -> Call:
        """Return this call after what the output starts has been started by a first batch, if it has not been.

        An evaluation before training starts it for itself and leaves the layer as it was.
        """
        output = self.recipe.output
        if output is None or not output.weight.range.wants_output(self.state_of("output", "weight")):
            return self
        bias = bias if output.weight.range.scales_bias else None
        states = {role: self.state_of("output", role) for role in values}
        if not self.update:
            states = {role: {name: t.detach().clone() for name, t in state.items()} for role, state in states.items()}
        with torch.no_grad():
            x, weight = (self.quantize("output", role, v, self.update, states[role])[0] for role, v in values.items())
            found = self.products.product("output", x, weight, bias=bias, compute=self.compute)
            wanted = self.products.in_float("output", *(value.float() for value in values.values()))
            if bias is not None:
                wanted = wanted + self.products.bias_for_output(bias.float(), wanted.dim())
            usable = all(bool(state.get("started", torch.ones(1))) for state in states.values())
            output.weight.range.match_output(states["weight"], wanted, found, self.update and usable)
        if self.update:
            return self
        return replace(self, state_of=lambda product, role: states.get(role, {}))

    def bias_gradient(self, g: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the bias; what the quantizers of ``g`` ask of it is found in the same pass."""
        specs = [spec for spec in (self.recipe.grad_input, self.recipe.grad_weight) if spec is not None]
        asked = any(spec.gradient.asks_magnitude for spec in specs)
        return self.products.bias_gradient(g, asked and known_width(g) is None)

    def twice(self, values: dict[str, torch.Tensor], bias: torch.Tensor | None, seen: Seen) -> torch.Tensor:
        """Return the output by operations that autograd differentiates twice; tell ``seen`` of discretized tensors."""
        used = dict(values)
        if self.recipe.output is not None:
            for role, value in values.items():
                q, state = self.quantizer("output", role), self.state_of("output", role)
                codes, low, high = q.quantize_with_range(
                    value, state=state, update=False, tokens=self.products.tokens, compute=self.compute
                )
                if codes.rotation is not None:  # the range holds for what was rotated
                    low, high = torch.full_like(low, -torch.inf), torch.full_like(high, torch.inf)
                ends = (q.grain.expand(low, value.shape), q.grain.expand(high, value.shape))
                discretized, used[role] = q.estimator.twice(value, codes.dequantize(), ends, q.grid, state)
                seen(self.name, role, discretized)
        y = self.products.in_float("output", used["input"].to(self.dtype), used["weight"].to(self.dtype))
        return y if bias is None else y + self.products.bias_for_output(bias.to(y.dtype), y.dim())

    def _error(self, q: Quantizer, role: str, value: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """Return the error that quantizing an operand leaves after a rotation of its features."""
        turned = rotation.along(self.products.own_axis(role, 1)).forward(value.detach())
        plain = replace(q, rotation=None)
        fresh = plain.init_state(torch.Size(q.grain.scale_shape(turned.shape)).numel())
        return (plain.quantize(turned, state=fresh, tokens=self.products.tokens).dequantize() - turned).double().norm()

    def quantize(
        self, product: str, role: str, value: torch.Tensor, update: bool, state: State | None = None
    ) -> tuple[QTensor, torch.Tensor | None]:
        """Return an operand's codes, and where its gradient passes (None: everywhere)."""
        q = self.quantizer(product, role)
        # layers that take the same input share its codes: query, key and value, or a block and its shortcut
        shared = Shared.of(value, q, self.products.tokens) if (role, self.compute) == ("input", "auto") else None
        if shared is not None and shared.codes is not None:
            return shared.codes, None
        weight = role == "weight" and product == "output" and self.compute == "auto"
        if weight and (known := kept_codes(value, q)) is not None:
            return known, None
        codes, low, high = q.quantize_with_range(
            value,
            noise=self.key(product, role) if q.is_stochastic else None,
            state=self.state_of(product, role) if state is None else state,
            update=update,
            compute=self.compute,
            tokens=self.products.tokens,
            axis=None if q.rotation is None else self.products.own_axis(role, q.rotation.axis),
        )
        if role == "gradient" and q.is_plain:  # the other backward product asks next
            note_width(value, high)
        if self.on_nonfinite == "raise" and not bool(torch.isfinite(codes.scale).all()):
            raise NonFiniteError(f"{role} of layer {self.name!r} holds NaN or Inf (on_nonfinite='raise')")
        if shared is not None:
            shared.keep(codes)
        if weight:
            keep_codes(value, q, codes)
        if role == "gradient" or q.estimator.learns or not (q.range.can_clip or q.estimator.shapes):
            return codes, None
        turned = value if codes.rotation is None else codes.rotation.forward(value)
        return codes, q.estimator.mask(turned, low, high)


def quantizer_of(recipe: Recipe, product: str, role: str) -> Quantizer:
    """Return the quantizer of an operand."""
    return recipe.by_operand[product, role]


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Return a context in which nothing is cast; where autocast is off already, one that costs nothing."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
