"""Bias and variance of a network's quantized gradients, measured on a real batch, next to the closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from gradbits.core.checks import check_choice, check_integer
from gradbits.core.errors import ArgumentError
from gradbits.observe.closed_form import ClosedForm, product_variance
from gradbits.observe.replay import (
    PRODUCTS,
    Layers,
    Use,
    as_it_was,
    copy_states,
    exact_backward,
    quantized_layers,
    random_state,
    restore_states,
    step,
)

SKETCH = 4096  # random projections that the test for bias looks at
SCOPES = {"layer": "noise of each layer alone", "network": "noise of the whole network"}


@dataclass(frozen=True)
class GradientNoise:
    """One backward product of one layer, over repeated draws of the quantizers' noise.

    Args:
        layer: the layer's name; a second call of the same layer in one step ends in ``#2``.
        product: ``"grad_input"`` or ``"grad_weight"``.
        size: squared norm of the unquantized gradient.
        variance: sum of the variances of all elements.
        bias: norm of the mean's deviation from the unquantized gradient, its own noise taken off.
        bias_z: that squared deviation in standard deviations of what noise alone gives; beyond about 5 it is bias.
        predicted: the variance in closed form for these values; NaN where none is known.
        bound: the variance's closed-form bound; NaN where none is known.
    """

    layer: str
    product: str
    size: float
    variance: float
    bias: float
    bias_z: float
    predicted: float
    bound: float

    @property
    def relative(self) -> float:
        """Variance in units of the gradient's squared norm."""
        return self.variance / self.size if self.size else math.nan


@dataclass(frozen=True)
class VarianceReport:
    """What ``measure_variance`` found.

    Args:
        scope: ``"layer"`` or ``"network"``.
        draws: how often the noise was drawn.
        rows: one for each backward product of each quantized layer.
    """

    scope: str
    draws: int
    rows: tuple[GradientNoise, ...]

    def total(self, product: str) -> float:
        """Return the variance of one product summed over the layers."""
        return sum(row.variance for row in self.rows if row.product == product)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values; a number that is not known is None."""
        rows = [
            {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(row).items()}
            for row in self.rows
        ]
        return {"scope": self.scope, "draws": self.draws, "rows": rows}

    def __str__(self) -> str:
        head = ["layer", "product", "|grad|^2", "variance", "predicted", "bound", "var/|grad|^2", "|bias|/|grad|", "z"]
        table = [head]
        for r in self.rows:
            bias = r.bias / math.sqrt(r.size) if r.size else math.nan
            numbers = (r.size, r.variance, r.predicted, r.bound, r.relative, bias, r.bias_z)
            table.append([r.layer, r.product, *("-" if math.isnan(v) else f"{v:.3g}" for v in numbers)])
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table]
        return "\n".join([*lines, f"{self.draws} draws, {SCOPES[self.scope]}"])


class Moments:
    r"""Mean and variance of a tensor around its exact value over draws, in float64, and a test for bias.

    The test looks at random projections e of each draw's error. Without bias the mean product of two different draws,
    :math:`U = \overline{e_i^\top e_j}`, has mean 0 and variance :math:`2\,\overline{(e_i^\top e_j)^2}/n(n-1)`.

    Args:
        exact: the value that the draws estimate.
    """

    def __init__(self, exact: torch.Tensor) -> None:
        self.exact = exact.double()
        self.mean, self.squares = torch.zeros_like(self.exact), torch.zeros_like(self.exact)
        count = exact.numel()
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (count + -count % SKETCH,), generator=generator).double() * 2 - 1
        self.signs = signs.to(exact.device) if count > SKETCH else None
        self.sketches: list[torch.Tensor] = []

    def add(self, value: torch.Tensor) -> None:
        """Take in one draw."""
        error = value.double() - self.exact
        change = error - self.mean
        self.mean += change / (len(self.sketches) + 1)
        self.squares += change * (error - self.mean)
        flat = error.flatten()
        if self.signs is not None:
            padded = torch.cat([flat, flat.new_zeros(self.signs.numel() - flat.numel())])
            flat = (padded * self.signs).view(-1, SKETCH).sum(0)
        self.sketches.append(flat)

    def row(self, layer: str, product: str, predicted: float, bound: float) -> GradientNoise:
        """Return what the draws say."""
        n, size = len(self.sketches), float(self.exact.square().sum())
        variance = float(self.squares.sum()) / (n - 1)
        excess = float(self.mean.square().sum()) - variance / n
        sketch = torch.stack(self.sketches)
        centred = sketch - sketch.mean(0)
        pairs = n * (n - 1)
        spread = math.sqrt(2.0 * float(_of_different_draws(centred).square().sum())) / pairs
        spread += 1e-12 * size  # below float32's resolution nothing can be said
        return GradientNoise(
            layer=layer,
            product=product,
            size=size,
            variance=variance,
            bias=math.sqrt(max(excess, 0.0)),
            bias_z=float(_of_different_draws(sketch).sum()) / pairs / spread if spread else 0.0,
            predicted=predicted,
            bound=bound,
        )


def _of_different_draws(errors: torch.Tensor) -> torch.Tensor:
    """Return the products of the errors [draws, elements] of two different draws; 0 for a draw with itself."""
    gram = errors @ errors.t()
    return gram.fill_diagonal_(0.0)


def measure_variance(
    model: nn.Module, run: Callable[[], torch.Tensor], *, draws: int = 64, scope: str = "layer"
) -> VarianceReport:
    """Draw the quantizers' noise again and again on one batch; return bias and variance of every layer's gradients.

    The reference is the unquantized backward pass of the same quantized forward pass: what unbiased quantizers
    estimate. The model, its quantizer states, gradients and the random state are left as they were.

    Args:
        model: a quantized model.
        run: runs the forward pass on one batch and returns a scalar loss; called with the same random state each time.
        draws: how often the noise is drawn, at least 3.
        scope: ``"layer"`` draws the noise of one layer at a time, under the exact gradient of its output: the
            quantizers' own variance, which the closed forms predict. ``"network"`` draws all at once: what training
            sees, with the noise that deeper layers pass on.

    Raises:
        ArgumentError: no layer of the model is quantized or took part in the loss, or too few draws.

    >>> import gradbits as gb
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Linear(8, 4); _ = gb.quantize_(net, "statquant_psq"); x = torch.randn(16, 8)
    >>> report = measure_variance(net, lambda: net(x).square().mean(), draws=8)
    >>> [row.product for row in report.rows], all(row.variance <= row.bound for row in report.rows)
    (['grad_weight'], True)
    """
    check_integer(draws, "draws", 3)
    check_choice(scope, "scope", tuple(SCOPES))
    layers = quantized_layers(model)
    if not layers:
        raise ArgumentError("model: no layer is quantized; call quantize_ first")
    with as_it_was(model):
        start = random_state()
        step(layers, run, start, 0)  # starts every state that a first batch starts
        for _, layer in layers:
            layer.training = False  # from here on the ranges of the forward pass stay as they are
        with exact_backward(layers):
            uses = [use for use in step(layers, run, start, 0) if use.gradient is not None]
        if not uses:
            raise ArgumentError("run: no quantized layer took part in the loss that it returned")
        rows = _by_layer(uses, draws) if scope == "layer" else _by_network(layers, run, start, uses, draws)
        return VarianceReport(scope, draws, tuple(rows))


def _by_layer(uses: list[Use], draws: int) -> Iterator[GradientNoise]:
    for use in uses:
        layer, (x, weight, bias, size), g = use.layer, use.arguments, use.gradient
        assert g is not None
        moments = {product: Moments(exact) for product, exact in use.found.items()}
        own = [(use.name, layer)]
        states = copy_states(own)
        for draw in range(draws):
            restore_states(own, states)
            torch.manual_seed(draw)
            inputs = {"grad_input": x.detach().requires_grad_(), "grad_weight": weight.detach().requires_grad_()}
            with torch.enable_grad():
                y = layer.run(*inputs.values(), bias, size)
            call = getattr(y.grad_fn, "call", None)
            for moment, grad in zip(
                moments.values(), torch.autograd.grad(y, [inputs[product] for product in moments], g), strict=True
            ):
                moment.add(grad)
        restore_states(own, states)
        for product, moment in moments.items():
            if call is not None:
                form = product_variance(call, product, g, weight if product == "grad_input" else x)
            else:  # a batch norm is folded into the layer and comes last in its graph
                known = 0.0 if getattr(layer.assignment.recipe, product) is None else math.nan
                form = ClosedForm(known, known)
            yield moment.row(use.name, product, form.predicted, form.bound)


def _by_network(
    layers: Layers, run: Callable[[], torch.Tensor], start: list[torch.Tensor], uses: list[Use], draws: int
) -> Iterator[GradientNoise]:
    moments = {(use.name, p): Moments(use.found[p]) for use in uses for p in PRODUCTS if p in use.found}
    states = copy_states(layers)
    for draw in range(draws):
        restore_states(layers, states)
        for use in step(layers, run, start, draw + 1):
            for product, value in use.found.items():
                moments[use.name, product].add(value)
    for (name, product), moment in moments.items():
        yield moment.row(name, product, math.nan, math.nan)
