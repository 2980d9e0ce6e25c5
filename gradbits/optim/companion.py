"""What a recipe asks of the optimizer: deviation-counteractive learning rate scaling."""

from __future__ import annotations

import math
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import nn

from gradbits.core.checks import check_instance, check_module, check_number
from gradbits.core.errors import ArgumentError, DtypeError
from gradbits.core.ranks import mean_over_ranks
from gradbits.nn.quantized import Quantized
from gradbits.optim.groups import group_quantizer_parameters_


def learning_rate_factor(deviation: float, alpha: float = 20.0, beta: float = 0.1) -> float:
    r"""Return :math:`\phi(d) = \max(e^{-\alpha d}, \beta)`.

    >>> [round(learning_rate_factor(d), 4) for d in (0.0, 0.05, 0.1, 0.2)]
    [1.0, 0.3679, 0.1353, 0.1]
    """
    return max(math.exp(-alpha * deviation), beta)


class DeviationCounteractiveLR:
    r"""Scales the learning rate of each quantized layer by how far its quantized gradient deviates (DCLRS).

    .. math:: \eta_l = \eta\,\max(e^{-\alpha d_c}, \beta)

    It is the learning rate that is scaled, not the gradient: with momentum the two differ. During ``optimizer.step()``
    the optimizer sees its parameter groups split by layer; before and after, it sees the groups that it was given, so
    its ``state_dict`` and learning-rate schedulers know nothing of this.

    In a distributed run every rank sees other gradients, so deviations are averaged over the ranks before each step:
    replicas that stepped with their own factors would drift apart.

    Args:
        optimizer: any PyTorch optimizer.
        model: a model whose layers follow a recipe with ``learning_rate``.
        average: whether deviations are averaged over the default process group, where there is one; every rank must
            then take its optimizer steps together. False where ranks hold different layers.

    Raises:
        ArgumentError: no layer of the model has such a recipe.

    References:
        Zhu et al., Towards Unified INT8 Training for Convolutional Neural Network, CVPR 2020, arXiv:1912.12607.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, *, average: bool = True) -> None:
        self.optimizer = optimizer
        self.average = average
        self._layers: list[Any] = [
            m for m in model.modules() if isinstance(m, Quantized) and m.assignment.recipe.learning_rate is not None
        ]
        if not self._layers:
            raise ArgumentError("model: no layer follows a recipe that scales learning rates")
        for layer in self._layers:
            rate = layer.assignment.recipe.learning_rate
            check_number(rate.alpha, "alpha", 0.0)
            check_number(rate.beta, "beta", 0.0, 1.0)
        self._groups: list[dict[str, Any]] | None = None
        self._handles = [
            optimizer.register_step_pre_hook(self._split),
            optimizer.register_step_post_hook(self._restore),
        ]
        self._guard(optimizer)

    def factors(self) -> dict[str, float]:
        """Return the current factor of each layer by name, from what this rank has seen."""
        names = (layer.assignment.name for layer in self._layers)
        return dict(zip(names, self._factors(self._deviations()), strict=True))

    def detach(self) -> None:
        """Leave the optimizer as it was before."""
        for handle in self._handles:
            handle.remove()

    def _deviations(self) -> torch.Tensor:
        """Return the deviation of each layer; 0 where its gradient's range has none."""
        found = []
        for layer in self._layers:
            state = layer.state_of("grad_input", "gradient") or layer.state_of("grad_weight", "gradient")
            found.append(state["deviation"].reshape(()) if "deviation" in state else torch.zeros(()))
        device = next((d.device for d in found if d.device.type != "cpu"), torch.device("cpu"))
        return torch.stack([d.to(device, torch.float32) for d in found])

    def _factors(self, deviations: torch.Tensor) -> list[float]:
        rates = (layer.assignment.recipe.learning_rate for layer in self._layers)
        return [learning_rate_factor(d, r.alpha, r.beta) for d, r in zip(deviations.tolist(), rates, strict=True)]

    def _split(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._restore(optimizer, args, kwargs)
        deviations = self._deviations()
        factors = self._factors(mean_over_ranks(deviations) if self.average else deviations)
        factor_of = {
            p: f for layer, f in zip(self._layers, factors, strict=True) for p in layer.parameters(recurse=False)
        }
        self._groups = optimizer.param_groups
        split: list[dict[str, Any]] = []
        for group in optimizer.param_groups:
            by_factor: dict[float, list[torch.Tensor]] = {}
            for p in group["params"]:
                by_factor.setdefault(factor_of.get(p, 1.0), []).append(p)
            split += [{**group, "params": ps, "lr": group["lr"] * f} for f, ps in by_factor.items()]
        optimizer.param_groups = split

    def _guard(self, optimizer: torch.optim.Optimizer) -> None:
        """Restore the groups where a step raises: PyTorch calls no hook then."""
        original = optimizer.step

        @wraps(original)
        def step(opt: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
            try:
                return original(*args, **kwargs)
            except BaseException:
                self._restore(opt, args, kwargs)
                raise

        # a bound method, as schedulers expect; it does nothing more once the hooks are gone
        optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]

    def _restore(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._groups is not None:
            optimizer.param_groups = self._groups
            self._groups = None


def attach_companion_(
    optimizer: torch.optim.Optimizer, model: nn.Module, *, average: bool = True
) -> DeviationCounteractiveLR | None:
    """Attach what the model's recipes ask of ``optimizer``; return it, or None where nothing acts on its steps.

    Call it after ``quantize_``, with an optimizer that was built after it, and before making a learning-rate scheduler.
    Where a recipe says how to learn what its quantizers learn, that moves to parameter groups of its own.

    Args:
        optimizer: any PyTorch optimizer.
        model: a model with quantized layers.
        average: whether the ranks of a distributed run average what they have seen before each step, see
            ``DeviationCounteractiveLR``; False where ranks hold different layers, which would wait for each other.

    Raises:
        DtypeError: no optimizer, no module, or ``average`` is no bool.
        ArgumentError: the optimizer lacks parameters that the quantizers learn, or all of the model's, or has a
            companion for the model already.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise DtypeError(f"optimizer: must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
    check_module(model)
    check_instance(average, "average", bool)
    layers = [m for m in model.modules() if isinstance(m, Quantized)]
    held = {p for group in optimizer.param_groups for p in group["params"]}
    learned = [
        (f"{m.assignment.name}.quantizers.{name}", p)
        for m in layers
        if isinstance(states := getattr(m, "quantizers", None), nn.Module)
        for name, p in states.named_parameters()
    ]
    if missing := [name for name, p in learned if p.requires_grad and p not in held]:
        raise ArgumentError(
            f"optimizer: lacks {len(missing)} parameters that quantizers learn, the first is {missing[0]!r}; build the "
            "optimizer after quantize_"
        )
    group_quantizer_parameters_(optimizer, model)
    if not any(m.assignment.recipe.learning_rate is not None for m in layers):
        return None
    if not any(p in held for p in model.parameters()):
        raise ArgumentError("optimizer: holds none of the model's parameters")
    for hook in optimizer._optimizer_step_pre_hooks.values():
        other = getattr(hook, "__self__", None)
        if isinstance(other, DeviationCounteractiveLR) and any(layer in other._layers for layer in layers):
            raise ArgumentError("optimizer: has a companion for this model already; detach() that one first")
    return DeviationCounteractiveLR(optimizer, model, average=average)
