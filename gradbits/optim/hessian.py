"""The scaling factors of EWGS from second derivatives: Hutchinson's trace, per layer and operand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from gradbits.core.checks import check_integer, check_module, check_number
from gradbits.core.errors import ArgumentError, DtypeError
from gradbits.core.ranks import mean_over_ranks
from gradbits.nn.quantized import Quantized
from gradbits.nn.twice import twice_differentiable
from gradbits.quantizers.ewgs import EWGS
from gradbits.recipes.learning import HessianScaling

Probe = Callable[[torch.Tensor], torch.Tensor]
Loss = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Trace:
    """What one estimate of a trace found.

    Args:
        mean: mean over the probes of v·Hv.
        probes: how many were drawn.
    """

    mean: float
    probes: int


def rademacher(generator: torch.Generator | None = None) -> Probe:
    """Return a function that draws a tensor of -1 and 1 like the given one, from ``generator`` or PyTorch's own."""

    def draw(like: torch.Tensor) -> torch.Tensor:
        bits = torch.randint(0, 2, like.shape, generator=generator)
        return (2 * bits - 1).to(like)

    return draw


def hutchinson(
    gradient: torch.Tensor,
    at: torch.Tensor,
    *,
    probes: int = 50,
    tolerance: float = 1e-3,
    draw: Probe | None = None,
    official_behaviour: bool = False,
) -> Trace:
    r"""Estimate the trace of a Hessian, :math:`\mathrm{Tr}(H) = E[v^\top H v]` with :math:`v_i = \pm 1`.

    One more backward pass per probe; the variance is :math:`2\sum_{i \ne j} H_{ij}^2`, 0 for a diagonal H.

    Args:
        gradient: of a scalar by ``at``, computed with ``create_graph=True``.
        at: where the Hessian is taken.
        probes: most vectors v.
        tolerance: ends when the running mean changes by less than this part of its size, after two probes at least.
        draw: returns a vector v like the given tensor; drawn from PyTorch's generator if None.
        official_behaviour: compare with the signed mean, as the official code does; a negative one then ends at once.

    References:
        Hutchinson, Communications in Statistics 19 (1990); Yao et al., PyHessian, arXiv:1912.07145.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> (g,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
    >>> hutchinson(g, x)  # the Hessian is diagonal, 6 x
    Trace(mean=18.0, probes=2)
    """
    check_integer(probes, "probes", 1)
    check_number(tolerance, "tolerance", 0.0)
    draw = rademacher() if draw is None else draw
    total, known = 0.0, 0.0
    if not gradient.requires_grad:  # the scalar is linear in ``at``
        return Trace(0.0, 0)
    for count in range(1, probes + 1):
        v = draw(at)
        (product,) = torch.autograd.grad(gradient, at, v, retain_graph=True, allow_unused=True)
        total += 0.0 if product is None else float((product * v).sum())
        mean = total / count
        if official_behaviour:
            if abs(mean - known) / (known + 1e-6) < tolerance:
                break
        elif count > 1 and abs(mean - known) <= tolerance * abs(known):
            break
        known = mean
    return Trace(mean, count)


def scaled_layers(model: nn.Module) -> list[Quantized]:
    """Return the layers of ``model`` whose gradients are scaled by a measured factor."""
    return [m for m in model.modules() if isinstance(m, Quantized) and _is_scaled(m)]


def _is_scaled(layer: Quantized) -> bool:
    recipe = layer.assignment.recipe
    return recipe.hessian is not None and recipe.output is not None and isinstance(recipe.output.weight.estimator, EWGS)


@dataclass
class _Sum:
    """The sum over the batches of one tensor's ratios, and how many were finite."""

    total: float = 0.0
    count: int = 0
    traces: list[Trace] = field(default_factory=list)


def measure_deltas_(
    model: nn.Module, losses: Iterable[Loss], *, rule: HessianScaling | None = None, draw: Probe | None = None
) -> dict[tuple[str, str], float]:
    r"""Measure the factor δ of every layer's weights and activations, set it, and return it by (layer, operand).

    .. math:: \delta = \max\Big(0,\ \frac{1}{B} \sum \frac{\mathrm{Tr}(H)/N}{3\,\mathrm{std}(g_{x_q})}\Big)

    over B batches, H the Hessian of the loss by the N discretized values in [0, 1]. Statistics of batch norms,
    parameters, their gradients and, where ``draw`` is given, the random state are as they were afterwards. A tensor
    whose gradient has no spread, or is not finite, keeps its δ.

    Args:
        model: quantized by ``ewgs``; in the mode (training or evaluation) in which its gradients are wanted.
        losses: functions, one for each batch, that run the model and return the loss, a scalar.
        rule: None takes that of the model's recipe.
        draw: see ``hutchinson``.

    Raises:
        ArgumentError: no layer measures its factor, no batch, or a loss that is no scalar.
        DtypeError: ``losses`` gives something else than functions.

    References:
        Lee, Kim, Ham, CVPR 2021, arXiv:2104.00903.
    """
    check_module(model)
    layers = scaled_layers(model)
    if not layers:
        raise ArgumentError("model: no layer follows a recipe that measures the scaling of its gradients")
    rule = rule or layers[0].assignment.recipe.hessian
    assert rule is not None
    if isinstance(losses, torch.Tensor) or not isinstance(losses, Iterable):
        raise DtypeError(f"losses: must give functions that return the loss of a batch, not {type(losses).__name__}")
    keys = [(layer.assignment.name, role) for role in ("input", "weight") for layer in layers]
    sums = {key: _Sum() for key in keys}
    divisor = 0
    with _kept_statistics(model), twice_differentiable(model) as seen:
        for index, loss in enumerate(losses):
            # the official loop leaves one batch later, and divides by the index at which it stands then
            divisor = index if rule.official_behaviour else index + 1
            if index == rule.batches:
                divisor = rule.batches
                break
            _measure(loss, keys, seen, sums, rule, draw)
            if index + 1 == rule.batches and not rule.official_behaviour:
                break
    if not any(s.traces for s in sums.values()):
        raise ArgumentError("losses: must give at least one batch")
    return _settle(layers, sums, divisor, rule)


def _measure(
    loss: Loss,
    keys: list[tuple[str, str]],
    seen: dict[tuple[str, str], torch.Tensor],
    sums: dict[tuple[str, str], _Sum],
    rule: HessianScaling,
    draw: Probe | None,
) -> None:
    """Add one batch's ratios."""
    if not callable(loss):
        raise DtypeError(f"losses: must give functions that return the loss of a batch; one is {type(loss).__name__}")
    seen.clear()
    with torch.enable_grad():
        value = loss()
        if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
            raise ArgumentError("losses: each must return the loss of a batch, a scalar that requires a gradient")
        present = [key for key in keys if key in seen]
        grads = torch.autograd.grad(value, [seen[key] for key in present], create_graph=True, allow_unused=True)
    for key, grad in zip(present, grads, strict=True):
        if grad is None or grad.numel() < 2:
            continue
        trace = hutchinson(
            grad,
            seen[key],
            probes=rule.probes,
            tolerance=rule.tolerance,
            draw=draw,
            official_behaviour=rule.official_behaviour,
        )
        sums[key].traces.append(trace)
        spread = 3.0 * float(grad.detach().std())
        ratio = trace.mean / grad.numel() / spread if spread > 0.0 else math.nan
        if math.isfinite(ratio):
            sums[key].total += ratio
            sums[key].count += 1


def _settle(
    layers: list[Quantized], sums: dict[tuple[str, str], _Sum], divisor: int, rule: HessianScaling
) -> dict[tuple[str, str], float]:
    """Set and return the factors; the ranks of a distributed run agree on the mean of theirs."""
    own = [[s.total, float(s.count)] for s in sums.values()]
    shared = mean_over_ranks(torch.tensor(own, dtype=torch.float64))
    found: dict[tuple[str, str], float] = {}
    by_name = {layer.assignment.name: layer for layer in layers}
    for key, (total, count) in zip(sums, shared.tolist(), strict=True):
        state = by_name[key[0]].state_of("output", key[1])["delta"]
        over = float(divisor) if rule.official_behaviour else count
        if count > 0 and over > 0:
            state.fill_(max(0.0, total / over))
        found[key] = float(state)
    return found


@contextmanager
def _kept_statistics(model: nn.Module) -> Iterator[None]:
    """A context after which the running statistics of normalisations are what they were."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    kept = [{name: buffer.clone() for name, buffer in m.named_buffers()} for m in norms]
    try:
        yield
    finally:
        for module, buffers in zip(norms, kept, strict=True):
            for name, buffer in module.named_buffers():
                buffer.copy_(buffers[name])
