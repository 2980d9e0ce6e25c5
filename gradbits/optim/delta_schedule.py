"""When the scaling factors of EWGS are measured anew during a training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from gradbits.core.checks import check_integer, check_module
from gradbits.core.errors import ArgumentError, DtypeError
from gradbits.core.noise import NoiseKey
from gradbits.optim.hessian import Loss, measure_deltas_, rademacher, scaled_layers


class DeltaSchedule:
    """Measures the factors δ of a model quantized by ``ewgs`` after every period of its recipe.

    Call ``after_step`` after each optimizer step, counting from 1. The factors live in the model's ``state_dict``; the
    probes depend on the seed and the step alone, so a resumed run measures the same.

    Args:
        model: quantized; its recipe says how often and how exactly to measure.
        losses: returns, for a step, functions without arguments that each run the model on a batch and return the loss;
            as many are called as the recipe has batches.
        steps_per_epoch: steps of the epochs in which the recipe counts.
        total: steps of the training; after the last nothing is measured.
        seed: of the probes.

    Raises:
        ArgumentError: no layer measures its factor, layers follow recipes that measure in different ways, ``losses``
            does not take a step, or a number that is not legal.
        DtypeError: ``losses`` is no function, or another argument has a wrong type.

    >>> import gradbits as gb
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> _ = gb.quantize_(net, gb.recipe("ewgs", keep_float=()))
    >>> x = torch.randn(8, 3); loss = lambda: net(x).square().mean(); _ = loss()
    >>> schedule = DeltaSchedule(net, lambda step: [loss] * 3, steps_per_epoch=10)
    >>> schedule.after_step(9); schedule.after_step(10); sorted(schedule.latest)[0]
    ('0', 'input')
    """

    def __init__(
        self,
        model: nn.Module,
        losses: Callable[[int], Iterable[Loss]],
        *,
        steps_per_epoch: int,
        total: int | None = None,
        seed: int = 0,
    ) -> None:
        check_module(model)
        _check_losses(losses)
        rules = {layer.assignment.recipe.hessian for layer in scaled_layers(model)}
        if len(rules) != 1:
            what = "layers measure in several ways" if rules else "no layer measures the scaling of its gradients"
            raise ArgumentError(f"model: {what}; must follow one recipe such as ewgs")
        self.model = model
        self.losses = losses
        (rule,) = rules
        assert rule is not None
        self.rule = rule
        self.period = rule.period * check_integer(steps_per_epoch, "steps_per_epoch", 1)
        self.total = None if total is None else check_integer(total, "total", 1)
        self.seed = check_integer(seed, "seed", 0)
        self.latest: dict[tuple[str, str], float] = {}  # δ by (layer, operand), as the latest measurement left it

    def after_step(self, step: int) -> None:
        """Measure if ``step``, counted from 1, ends a period."""
        if check_integer(step, "step", 1) % self.period or (self.total is not None and step >= self.total):
            return
        device = next(self.model.parameters()).device
        key = NoiseKey.of(self.seed, step)
        probes = torch.Generator().manual_seed((key.k0 & 0xFFFFFFFF) << 31 | key.k1 & 0x7FFFFFFF)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # for dropout and the like
            self.latest = measure_deltas_(self.model, self.losses(step), rule=self.rule, draw=rademacher(probes))

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the model's own state holds the factors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what ``state_dict`` returned."""


def _check_losses(losses: Any) -> None:
    """Refuse now what would fail after a whole period of training."""
    legal = "must be a function of the step that returns functions, each without arguments, of a batch's loss"
    if not callable(losses):
        raise DtypeError(f"losses={losses!r}: {legal}")
    try:
        signature = inspect.signature(losses)
    except (ValueError, TypeError):  # written in C
        return
    try:
        signature.bind(1)
    except TypeError as error:
        raise ArgumentError(f"losses: {legal}; this one cannot be called with a step: {error}") from None
