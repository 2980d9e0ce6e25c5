"""Gradient L1 regularization: train a float network so that it can be quantized later, to whatever number of bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import nn

from gradbits.core.checks import check_instance, check_integer, check_module, check_number
from gradbits.core.errors import ArgumentError, DoubleBackwardError, DtypeError
from gradbits.nn.layers import QUANTIZED_CLASSES
from gradbits.nn.quantized import Quantized

Recorded = list[tuple[str, torch.Tensor]]


def gradient_l1(
    loss: torch.Tensor,
    model: nn.Module,
    *,
    weight: float = 0.01,
    activation: float = 0.0,
    recorded: Recorded | None = None,
    layers: Sequence[str] | None = None,
    per_element: bool = False,
    step: int | None = None,
    start: int = 0,
    warmup: int = 0,
    every: int = 1,
) -> torch.Tensor:
    r"""Return the L1 norms of the loss's gradients as a term to add to the loss.

    .. math:: \lambda_w \sum_l \Big\|\frac{\partial L}{\partial W_l}\Big\|_1 +
              \lambda_y \sum_l \Big\|\frac{\partial L}{\partial Y_l}\Big\|_1

    Rounding to a grid of step D moves every element by at most D/2, so to first order it raises the loss by at most
    D/2 times these norms: small norms serve every D. W are the weights of linear layers and convolutions, Y the
    activations that go into them. Backward through the term differentiates twice, which costs about as much again as
    an ordinary step; a coefficient of 0 costs nothing and changes no bit.

    The term does not run the model, so batch norms update their running statistics once. Under autocast, and with a
    gradient scaler, pass the unscaled loss and scale the sum. With several processes each one's term is of its own
    batch, as its loss is; the first derivative bypasses the hooks of data-parallel modules.

    Args:
        loss: the mean loss of a batch, a scalar; before ``backward``.
        model: in float, or the data-parallel module around it.
        weight: ``λ_w``.
        activation: ``λ_y``; needs ``recorded``.
        recorded: what ``record_activations`` gave for this loss.
        layers: name patterns of the layers whose weights count; None takes all of them.
        per_element: whether each norm is divided by the number of elements, so that large layers do not dominate.
        step: number of the training step, from 1; None: no schedule, the term is always on.
        start: steps before the first with a term.
        warmup: further steps over which the coefficients rise to their value.
        every: the term comes with every so many steps only, then that much larger.

    Raises:
        ArgumentError: a coefficient that is negative or not finite, a loss that is no scalar, has no gradient or went
            through ``backward``, a weight that is frozen or has no part in the loss, a model without such layers.
        DtypeError: ``recorded`` is not what ``record_activations`` gives, or another argument has a wrong type.
        DoubleBackwardError: a layer is quantized; its integer products have no second derivative.

    References:
        Alizadeh et al., Gradient L1 Regularization for Quantization Robustness, ICLR 2020, arXiv:2002.07520. The
        coefficients' defaults are ours: the paper searched for them model by model.

    >>> net = nn.Linear(2, 1, bias=False); _ = nn.init.ones_(net.weight)
    >>> loss = 0.5 * (net(torch.tensor([1.0, -3.0])) - 1.0).square().sum()  # w·x - y = -3, |x| sums to 4
    >>> gradient_l1(loss, net, weight=0.5).item()
    6.0
    """
    factor = _factor(step, start, warmup, every)
    weight = check_number(weight, "weight", 0.0) * factor
    activation = check_number(activation, "activation", 0.0) * factor
    check_instance(per_element, "per_element", bool)
    check_module(model)
    _check_loss(loss)
    if weight == 0.0 and activation == 0.0:
        return loss.new_zeros(())
    wanted = [(name, w, weight) for name, w in _weights(model, layers)] if weight else []
    wanted += [(name, y, activation) for name, y in _activations(recorded, activation)] if activation else []
    _refuse_quantized(model)
    with torch.autocast(loss.device.type, enabled=False), torch.enable_grad():
        grads = _first_derivatives(loss, [t for _, t, _ in wanted])
        total = loss.new_zeros((), dtype=torch.float32)
        for (name, _, coefficient), grad in zip(wanted, grads, strict=True):
            if grad is None:
                raise ArgumentError(f"layer {name!r} has no part in the loss; leave it out with layers=...")
            norm = grad.float().abs()
            total = total + coefficient * (norm.mean() if per_element and grad.numel() else norm.sum())
    return total.to(loss.dtype)


def _factor(step: int | None, start: int, warmup: int, every: int) -> float:
    """Return what the coefficients are multiplied with at a step."""
    check_integer(start, "start", 0)
    check_integer(warmup, "warmup", 0)
    check_integer(every, "every", 1)
    if step is None:
        return 1.0
    past = check_integer(step, "step", 1) - start
    if past < 1 or (past - 1) % every:
        return 0.0
    return every * (min(1.0, past / warmup) if warmup else 1.0)


def _check_loss(loss: torch.Tensor) -> None:
    if not isinstance(loss, torch.Tensor):
        raise DtypeError(f"loss: must be a tensor, not {type(loss).__name__}")
    if loss.numel() != 1 or loss.dim() > 1:
        raise ArgumentError(f"loss: has shape {tuple(loss.shape)}; must be a scalar, the mean over the batch")
    if not loss.requires_grad:
        raise ArgumentError("loss: has no gradient; compute it outside of torch.no_grad, before backward")


def _activations(recorded: Recorded | None, activation: float) -> Recorded:
    """Return what was recorded, checked."""
    if not recorded:
        raise ArgumentError(
            f"activation={activation}: needs recorded=..., what record_activations(model) gave while the loss was "
            "computed, with at least one activation that requires a gradient"
        )
    legal = "must be what record_activations(model) gave, a list of (name, tensor) pairs"
    if not isinstance(recorded, (list, tuple)):
        raise DtypeError(f"recorded: {legal}, not {type(recorded).__name__}")
    for index, each in enumerate(recorded):
        if not (isinstance(each, tuple) and len(each) == 2 and isinstance(each[1], torch.Tensor)):
            raise DtypeError(f"recorded[{index}]: {legal}; this is {type(each).__name__}")
        if not each[1].requires_grad:
            raise ArgumentError(f"recorded[{index}]: input of layer {each[0]!r} requires no gradient; leave it out")
    return list(recorded)


def _first_derivatives(loss: torch.Tensor, tensors: list[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    try:
        return torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise ArgumentError("loss: went through backward, which freed its graph; call gradient_l1 before") from error


def quantizable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers of ``model`` that a recipe could quantize, quantized or not, by name."""
    for name, module in model.named_modules():
        if isinstance(module, Quantized) or type(module) in QUANTIZED_CLASSES:
            yield name, module


def _refuse_quantized(model: nn.Module) -> None:
    for name, module in quantizable(model):
        if isinstance(module, Quantized):
            raise DoubleBackwardError(
                f"layer {name!r} is quantized and cannot be differentiated twice; gradient_l1 prepares a float model"
            )


def _weights(model: nn.Module, layers: Sequence[str] | None) -> list[tuple[str, torch.Tensor]]:
    """Return the weights that count, each once."""
    if isinstance(layers, str):
        raise DtypeError(f"layers={layers!r}: must be a sequence of name patterns")
    found: list[tuple[str, torch.Tensor]] = []
    known: set[torch.Tensor] = set()
    for name, module in quantizable(model):
        value = getattr(module, "weight", None)
        chosen = layers is None or any(fnmatchcase(name, pattern) for pattern in layers)
        if not chosen or not isinstance(value, torch.Tensor) or value in known:
            continue
        if not value.requires_grad:
            raise ArgumentError(f"layer {name!r}: its weight is frozen; leave it out with layers=...")
        known.add(value)
        found.append((name, value))
    if not found:
        raise ArgumentError(f"layers={layers!r}: the model has no such linear layer or convolution")
    return found


@contextmanager
def record_activations(model: nn.Module, layers: Sequence[str] | None = None) -> Iterator[Recorded]:
    """A context that records what goes into the linear layers, convolutions and ``gradbits.nn.Matmul`` of ``model``.

    Args:
        model: any module.
        layers: name patterns of the layers; None takes all of them.

    Yields:
        (name of the layer, tensor) in the order of the forward pass; tensors that need no gradient, as a batch itself,
        are left out.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> with record_activations(net) as seen:
    ...     loss = net(torch.ones(1, 2)).square().mean()
    >>> [(name, tuple(x.shape)) for name, x in seen]
    [('2', (1, 3))]
    """
    check_module(model)
    seen: Recorded = []

    def note(name: str, module: nn.Module, inputs: tuple[object, ...]) -> None:
        seen.extend((name, x) for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad)

    handles = [
        module.register_forward_pre_hook(partial(note, name))
        for name, module in quantizable(model)
        if layers is None or any(fnmatchcase(name, pattern) for pattern in layers)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
