"""How a trained float model does when it is quantized afterwards, to several numbers of bits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from gradbits.core.checks import check_bits, check_choice, check_module
from gradbits.core.errors import ArgumentError, DtypeError
from gradbits.core.grain import PerTensor
from gradbits.nn import quantize_
from gradbits.nn.layers import QUANTIZED_CLASSES
from gradbits.nn.quantized import Quantized
from gradbits.quantizers.grids import Affine, Grid, Symmetric
from gradbits.quantizers.quantizer import Quantizer
from gradbits.quantizers.ranges import EMA, AbsMax, MinMax, min_max
from gradbits.recipes import Output, Recipe

SCHEMES = ("symmetric", "affine")
Ranges = dict[str, tuple[float, float]]
Bits = int | tuple[int, int]


def post_training_recipe(
    weight_bits: int, activation_bits: int, *, weights: str = "symmetric", activations: str = "affine"
) -> Recipe:
    """Return the recipe of post-training quantization: one scale per tensor, of weights by their extremes.

    >>> post_training_recipe(4, 8).output.input.grid
    Affine(bits=8, zero='nudge')
    """
    for name, scheme in (("weights", weights), ("activations", activations)):
        check_choice(scheme, name, SCHEMES)
    weight = Quantizer(grid=_grid(weights, weight_bits), range=AbsMax() if weights == "symmetric" else MinMax())
    # a range that calibration sets; in evaluation it stays
    operand = Quantizer(grid=_grid(activations, activation_bits), range=EMA(of=MinMax()))
    return Recipe(name="post_training", output=Output(input=operand, weight=weight))


def _grid(scheme: str, bits: int) -> Grid:
    return Symmetric(bits=bits) if scheme == "symmetric" else Affine(bits=bits, zero="nudge")


def calibrate(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None
) -> Ranges:
    """Return the extremes of what goes into each layer of a float model, over some batches.

    Args:
        model: in float; run in evaluation mode, without gradients, and left as it was.
        batches: inputs of the model; of a tuple or list, as a ``DataLoader`` gives (inputs, targets), the first.
        forward: runs the model on a whole batch; None calls ``model(inputs)``.

    Raises:
        ArgumentError: no batch with elements, a value that is not finite, or a quantized model.
        DtypeError: ``batches`` cannot be iterated over or is one tensor, or ``forward`` cannot be called.

    >>> calibrate(nn.Linear(2, 1), [torch.tensor([[0.0, 1.0]]), torch.tensor([[-3.0, 0.5]])])
    {'': (-3.0, 1.0)}
    """
    check_module(model)
    if isinstance(batches, torch.Tensor) or not isinstance(batches, Iterable):
        raise DtypeError(f"batches: must be a list of batches or a DataLoader, not {type(batches).__name__}")
    if forward is not None and not callable(forward):
        raise DtypeError(f"forward={forward!r}: must be a function of the model and a batch, or None")
    found: Ranges = {}

    def widen(name: str, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0]  # the second operand of a Matmul sets its range batch by batch
        if not x.numel():
            return
        low, high = (float(end) for end in min_max(x.detach(), PerTensor()))
        if not -float("inf") < low <= high < float("inf"):
            raise ArgumentError(f"batches: what goes into layer {name!r} is not finite")
        known = found.get(name, (low, high))
        found[name] = (min(low, known[0]), max(high, known[1]))

    with _watched(model, widen), torch.no_grad():
        for batch in batches:
            if forward is not None:
                forward(model, batch)
            else:
                model(batch[0] if isinstance(batch, (tuple, list)) and batch else batch)
    if not found:
        raise ArgumentError("batches: no layer saw a value; must hold at least one batch that is not empty")
    return found


@contextmanager
def _watched(model: nn.Module, note: Callable[[str, nn.Module, Any], None]) -> Iterator[None]:
    """A context in which ``note`` sees the inputs of each layer; the model is in evaluation mode meanwhile."""
    modes = [(module, module.training) for module in model.modules()]
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, Quantized):
            raise ArgumentError(f"model: layer {name!r} is quantized; must be a float model, see dequantize_")
        if type(module) in QUANTIZED_CLASSES:
            handles.append(module.register_forward_pre_hook(partial(note, name)))
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for handle in handles:
            handle.remove()


def post_training(model: nn.Module, ranges: Ranges, recipe: Recipe) -> nn.Module:
    """Return a copy of a float model, quantized with calibrated ranges and in evaluation mode."""
    quantized = copy.deepcopy(model).eval()
    quantize_(quantized, recipe)
    for name, module in quantized.named_modules():
        if isinstance(module, Quantized) and name in ranges:
            state = module.state_of("output", "input")
            for end, value in zip(("low", "high"), ranges[name], strict=True):
                state[end].fill_(value)
    return quantized


def evaluate_bits(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    batches: Iterable[Any],
    *,
    bits: Sequence[Bits] = (8, 6, 5, 4),
    weights: str = "symmetric",
    activations: str = "affine",
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> dict[Bits, float]:
    """Return how a trained float model does in few bits without training: post-training quantization, bit by bit.

    Every linear layer, convolution and ``gradbits.nn.Matmul`` multiplies integers. Weights have one scale per tensor by
    their extremes, activations one by the extremes over ``batches``. Each number of bits starts from the float
    weights, which stay as they are.

    Args:
        model: in float.
        evaluate: returns the quality of a model of this kind.
        batches: for calibration, a few training batches, as for ``calibrate``.
        bits: of weights and activations, 2 to 8; a pair gives each its own.
        weights, activations: ``"symmetric"`` or ``"affine"`` (zero is exact in both).
        forward: as for ``calibrate``.

    Raises:
        ArgumentError: bits or a scheme that are not legal, no usable batch, or a quantized model.
        DtypeError: an argument of a wrong type, or ``evaluate`` returns no number.

    >>> net = nn.Linear(2, 1); x = torch.tensor([[0.3, 0.9]])
    >>> found = evaluate_bits(net, lambda m: float((m(x) - net(x)).abs()), [x], bits=(8, 2))
    >>> found[8] < 0.02, list(found)
    (True, [8, 2])
    """
    if not callable(evaluate):
        raise DtypeError(f"evaluate={evaluate!r}: must be a function that takes a model and returns a number")
    if not isinstance(bits, Iterable):
        raise DtypeError(f"bits={bits!r}: must be a sequence of numbers of bits, such as (8, 4)")
    pairs: dict[Bits, tuple[int, int]] = {}
    for each in bits:
        pair = each if isinstance(each, tuple) else (each, each)
        if len(pair) != 2:
            raise ArgumentError(f"bits={each!r}: must be a number, or a pair of those of weights and activations")
        pairs[each] = (check_bits(pair[0], "bits"), check_bits(pair[1], "bits"))
    if not pairs:
        raise ArgumentError(f"bits={bits!r}: must name at least one number of bits")
    recipes = {
        each: post_training_recipe(*pair, weights=weights, activations=activations) for each, pair in pairs.items()
    }
    ranges = calibrate(model, batches, forward)
    with torch.no_grad():
        return {each: _number(evaluate(post_training(model, ranges, recipe))) for each, recipe in recipes.items()}


def _number(quality: object) -> float:
    if not hasattr(quality, "__float__") or (isinstance(quality, torch.Tensor) and quality.numel() != 1):
        raise DtypeError(f"evaluate: must return a number, not {type(quality).__name__}")
    return float(quality)
