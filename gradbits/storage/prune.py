"""Magnitude pruning: masks by threshold or by target sparsity, and a schedule that prunes while the model trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch

from gradbits.core.checks import check_integer, check_number
from gradbits.core.errors import ArgumentError, NothingToQuantizeError


def magnitude_mask(
    weight: torch.Tensor,
    *,
    sparsity: float | None = None,
    threshold: float | None = None,
    std_factor: float | None = None,
) -> torch.Tensor:
    """Return where ``weight`` is kept: False for the weights of least magnitude. Give exactly one of the three rules.

    Args:
        weight: any shape, finite floats.
        sparsity: part of the weights to prune, 0 to 1: exactly ``round(sparsity * numel)`` of them; among equal
            magnitudes those that come first go first.
        threshold: prune ``|w| < t``, t at least 0.
        std_factor: prune ``|w| < s * std(w)``, s at least 0.

    Raises:
        ArgumentError: not exactly one rule, a rule out of range, or weights that are not finite.

    >>> magnitude_mask(torch.tensor([3.0, -1.0, 0.5, -2.0]), sparsity=0.5).tolist()
    [True, False, False, True]

    References:
        S. Han, J. Pool, J. Tran, W. J. Dally, Learning both weights and connections, arXiv 1506.02626.
    """
    given = [rule for rule in (sparsity, threshold, std_factor) if rule is not None]
    if len(given) != 1:
        raise ArgumentError(f"magnitude_mask: {len(given)} rules given; give one of sparsity, threshold, std_factor")
    size = weight.detach().abs()
    if not bool(torch.isfinite(size).all()):
        raise ArgumentError("weight: holds NaN or Inf; weights to be pruned are finite")
    if sparsity is not None:
        return _keep_largest(size, round(check_number(sparsity, "sparsity", 0.0, 1.0) * size.numel()))
    if threshold is not None:
        return size >= check_number(threshold, "threshold", 0.0)
    spread = float(weight.detach().float().std(correction=0)) if size.numel() else 0.0
    return size >= check_number(std_factor, "std_factor", 0.0) * spread


def _keep_largest(size: torch.Tensor, pruned: int) -> torch.Tensor:
    if pruned == 0:
        return torch.ones_like(size, dtype=torch.bool)
    flat = size.reshape(-1)
    limit = flat.float().kthvalue(pruned).values.to(flat.dtype) if flat.dtype.itemsize < 4 else flat.kthvalue(pruned)[0]
    mask = flat > limit
    missing = flat.numel() - pruned - int(mask.sum())
    if missing > 0:  # weights of the same magnitude as the last one pruned
        mask[torch.nonzero(flat == limit).reshape(-1)[-missing:]] = True
    return mask.reshape(size.shape)


def prunable(model: torch.nn.Module, exclude: Iterable[str] = ()) -> dict[str, tuple[torch.nn.Module, str]]:
    """Return the parameters that are pruned: floats with two axes or more, by name, as (module, attribute).

    Args:
        model: the model.
        exclude: globs of parameter names to leave alone.

    Raises:
        NothingToQuantizeError: nothing is left.
    """
    patterns = tuple(exclude)
    found: dict[str, tuple[torch.nn.Module, str]] = {}
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        skip = any(fnmatchcase(name, pattern) for pattern in patterns)
        if parameter.dim() < 2 or not parameter.is_floating_point() or skip or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        path, _, attribute = name.rpartition(".")
        found[name] = (model.get_submodule(path), attribute)
    if not found:
        raise NothingToQuantizeError(f"model: has no weight of two axes or more outside exclude={patterns!r}")
    return found


def prune_(
    model: torch.nn.Module,
    *,
    sparsity: float | None = None,
    threshold: float | None = None,
    std_factor: float | None = None,
    exclude: Iterable[str] = (),
) -> dict[str, torch.Tensor]:
    """Set the weights of least magnitude of every layer to zero, in place, and return the masks (True = kept) by name.

    This is the one-shot form; ``PruneSchedule`` keeps the zeros while training goes on.

    Args:
        model: its parameters of two axes or more are pruned, each on its own.
        sparsity, threshold, std_factor: one of them, see ``magnitude_mask``.
        exclude: globs of parameter names to leave alone.

    Raises:
        ArgumentError: rules that are not legal.
        NothingToQuantizeError: no parameter to prune.

    >>> model = torch.nn.Linear(4, 4)
    >>> _ = prune_(model, sparsity=0.75)
    >>> int((model.weight != 0).sum())
    4
    """
    masks = {}
    for name, (module, attribute) in prunable(model, exclude).items():
        weight = module.get_parameter(attribute)
        mask = magnitude_mask(weight, sparsity=sparsity, threshold=threshold, std_factor=std_factor)
        with torch.no_grad():
            weight.mul_(mask)
        masks[name] = mask
    return masks


class PruneSchedule:
    """Prunes while a model trains: ``s_t = s_f + (s_0 - s_f) (1 - (t - t_0) / (t_1 - t_0))^3``, masks held in between.

    Call ``after_step(step)`` after every optimizer step. It prunes further when it is time, and sets pruned weights
    back to exact zero, whatever momentum or weight decay did to them; their gradients are masked too. Parameters keep
    names and shapes. A layer that has been shared since (``share_``) is left to its codebook, whose zero is fixed.

    Args:
        model: its parameters of two axes or more are pruned, each on its own.
        target: final sparsity s_f, 0 to 1.
        begin: step t_0 of the first pruning.
        end: step t_1 at which the target is reached; from there on masks are fixed.
        every: steps between prunings.
        initial: sparsity s_0.
        overrides: (glob, target) pairs for single layers, the first match wins; None leaves a layer alone.

    Raises:
        ArgumentError: a value out of range.
        NothingToQuantizeError: no parameter to prune.

    >>> model = torch.nn.Linear(10, 10)
    >>> schedule = PruneSchedule(model, target=0.9, begin=0, end=10, every=5)
    >>> for step in range(11):
    ...     schedule.after_step(step)
    >>> int((model.weight == 0).sum())
    90

    References:
        M. Zhu, S. Gupta, To prune, or not to prune, arXiv 1710.01878 (the cubic schedule).
        S. Han, J. Pool, J. Tran, W. J. Dally, Learning both weights and connections, arXiv 1506.02626.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        target: float,
        begin: int,
        end: int,
        every: int = 100,
        initial: float = 0.0,
        overrides: Iterable[tuple[str, float | None]] = (),
    ) -> None:
        check_number(target, "target", 0.0, 1.0)
        self.begin = check_integer(begin, "begin", 0)
        self.end = check_integer(end, "end", begin)
        self.every = check_integer(every, "every", 1)
        self.initial = check_number(initial, "initial", 0.0, 1.0)
        pairs = tuple(overrides)
        self.targets: dict[str, float] = {}
        self._places = prunable(model, [pattern for pattern, value in pairs if value is None])
        for name in self._places:
            chosen = next((value for pattern, value in pairs if fnmatchcase(name, pattern)), target)
            assert chosen is not None  # those were excluded above
            self.targets[name] = check_number(chosen, f"overrides: target of {name!r}", 0.0, 1.0)
        self.masks: dict[str, torch.Tensor] = {}
        for name in self._places:
            weight = self._weight(name)
            assert weight is not None
            self.masks[name] = torch.ones_like(weight, dtype=torch.bool)
        self._hooks = [self._hook(name) for name in self._places]
        self._done = -1  # the last step at which masks were made

    def sparsity_at(self, step: int, target: float) -> float:
        """Return the sparsity that the schedule asks for at ``step``."""
        if step < self.begin:
            return 0.0
        part = 1.0 if step >= self.end else (step - self.begin) / (self.end - self.begin)
        return target + (min(self.initial, target) - target) * (1 - part) ** 3

    def after_step(self, step: int) -> None:
        """Prune further if it is time, and keep what is pruned at zero; ``step`` counts optimizer steps."""
        due = self.begin <= step <= self.end and (step - self.begin) % self.every == 0
        if due or (step >= self.end and self._done < self.end):
            self._prune(step)
        self.apply()

    @torch.no_grad()
    def _prune(self, step: int) -> None:
        for name, target in self.targets.items():
            weight = self._weight(name)
            # a step with NaN must not decide what is pruned: the masks stay as they were
            if weight is None:
                continue
            if bool(torch.isfinite(weight).all()):
                kept = torch.where(self.masks[name], weight.abs(), -1.0)  # what is pruned stays pruned
                mask = _keep_largest(kept, round(self.sparsity_at(step, target) * weight.numel()))
                self.masks[name] = mask & self.masks[name]
            else:
                step = self._done
        self._done = step

    @torch.no_grad()
    def apply(self) -> None:
        """Set every pruned weight to exact zero."""
        for name, mask in self.masks.items():
            weight = self._weight(name)
            if weight is not None:
                weight.masked_fill_(~mask.to(weight.device), 0.0)

    def sparsity(self) -> dict[str, float]:
        """Return the part of pruned weights per layer."""
        return {name: 1.0 - float(mask.float().mean()) for name, mask in self.masks.items() if mask.numel()}

    def remove(self) -> None:
        """Take the gradient hooks off; weights stay as they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def state_dict(self) -> dict[str, Any]:
        """Return masks and position: tensors and an integer, which ``torch.load(..., weights_only=True)`` reads."""
        return {"masks": {name: mask.clone() for name, mask in self.masks.items()}, "done": self._done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned and apply the masks.

        Raises:
            ArgumentError: other layers or other shapes than in this model.
        """
        masks, done = state.get("masks"), state.get("done")
        if not isinstance(masks, Mapping) or set(masks) != set(self.masks):
            raise ArgumentError(f"state: masks must be there for {', '.join(sorted(self.masks))}")
        for name, mask in masks.items():
            if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.shape != self.masks[name].shape:
                raise ArgumentError(f"state: mask of {name!r} must be bool of shape {list(self.masks[name].shape)}")
        self._done = check_integer(done, "state['done']", -1)
        self.masks = {name: masks[name].to(old.device).clone() for name, old in self.masks.items()}
        self.apply()

    def _weight(self, name: str) -> torch.Tensor | None:
        module, attribute = self._places[name]
        return module._parameters.get(attribute)  # None once a parametrization took its place

    def _hook(self, name: str) -> Any:
        weight = self._weight(name)
        assert weight is not None

        def mask_gradient(gradient: torch.Tensor) -> torch.Tensor:
            mask = self.masks[name]
            return gradient * mask.to(gradient.device) if gradient.shape == mask.shape else gradient

        return weight.register_hook(mask_gradient) if weight.requires_grad else _NoHook()


class _NoHook:
    """A frozen weight has no gradient to mask."""

    def remove(self) -> None:
        """Nothing to take off."""
