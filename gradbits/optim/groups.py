"""Parameter groups: what quantizers learn gets a learning rate of its own and no weight decay."""

from __future__ import annotations

import torch
from torch import nn

from gradbits.core.errors import ArgumentError
from gradbits.nn.quantized import Quantized

MARK = "quantizer_rate"


def group_quantizer_parameters_(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Move what the quantizers of ``model`` learn into groups of their own, as the recipes ask.

    A group's copy has the recipe's part of its learning rate and no weight decay. A group that holds nothing else stays
    as it is: whoever made it has chosen. Calling it again changes nothing.

    Raises:
        ArgumentError: a learning-rate scheduler counts on the groups already.
    """
    rate_of: dict[torch.Tensor, float] = {}
    for layer in model.modules():
        if isinstance(layer, Quantized) and layer.assignment.recipe.quantizer_learning is not None:
            for p in layer.learned().values():
                rate_of[p] = layer.assignment.recipe.quantizer_learning.rate
    for group in list(optimizer.param_groups):
        learned = [p for p in group["params"] if p in rate_of]
        if not learned or MARK in group or len(learned) == len(group["params"]):
            continue
        if "initial_lr" in group:
            raise ArgumentError(
                "optimizer: has a learning-rate scheduler already; call attach_companion_ before making one, because "
                "what quantizers learn gets a parameter group of its own"
            )
        group["params"] = [p for p in group["params"] if p not in rate_of]
        for rate in sorted({rate_of[p] for p in learned}):
            own = {**group, "params": [p for p in learned if rate_of[p] == rate], "lr": group["lr"] * rate, MARK: rate}
            if "weight_decay" in group:
                own["weight_decay"] = 0.0
            optimizer.add_param_group(own)
