"""Pruning and weight sharing during a training: when each begins and ends, as companions of the network."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase

import torch
from torch import nn

from gradbits.storage.prune import PruneSchedule
from gradbits.train.companion import Companion
from gradbits.train.sharing import QUANTIZER_STATES, ShareSchedule

# shares of the steps: pruning begins, reaches its target; weights are shared, and the rest trains the codebooks
PRUNE_BEGIN, PRUNE_END, SHARE_BEGIN = 0.1, 0.6, 0.8
PRUNINGS = 50  # about so many times the masks grow


def compression_companions(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, prune: float | None, share: int | None, total_steps: int
) -> list[Companion]:
    """Return what prunes and shares the weights of a network while it trains, in the order in which it acts.

    Args:
        model: quantized already where it will be.
        optimizer: of its parameters.
        prune: final sparsity; None prunes nothing.
        share: bits of the codebooks; None shares nothing.
        total_steps: length of the training.

    Raises:
        ArgumentError: a value out of range.
        NothingToQuantizeError: the model has no weight of two axes or more.
    """
    companions: list[Companion] = []
    if prune is not None:
        begin, end = (max(1, math.ceil(part * total_steps)) for part in (PRUNE_BEGIN, PRUNE_END))
        every = max(1, (end - begin) // PRUNINGS)
        schedule = PruneSchedule(
            model, target=prune, begin=begin, end=end, every=every, overrides=((QUANTIZER_STATES, None),)
        )
        companions.append(schedule)
    if share is not None:
        begin = max(1, math.ceil(SHARE_BEGIN * total_steps))
        companions.append(ShareSchedule(model, optimizer, bits=share, begin=begin))
    return companions


def weight_sparsity(model: nn.Module) -> float:
    """Return the part of exact zeros among the floats of two axes or more, those that pruning is about.

    >>> layer = nn.Linear(4, 4)
    >>> _ = layer.weight.data[:3].zero_()
    >>> weight_sparsity(layer)
    0.75
    """
    weights = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2 and parameter.is_floating_point() and not fnmatchcase(name, QUANTIZER_STATES)
    ]
    count = sum(weight.numel() for weight in weights)
    return sum(int((weight == 0).sum()) for weight in weights) / count if count else 0.0
