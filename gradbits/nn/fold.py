r"""Batch norm folded into the weights of the layer before it, in training as in inference.

.. math:: w_\mathrm{fold} = f w, \qquad b_\mathrm{fold} = \beta + f\,(b - \mathrm{EMA}(\mu_B)), \qquad
          f = \frac{\gamma}{\sqrt{\mathrm{EMA}(\sigma_B^2)+\varepsilon}}
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

FOLDABLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def why_not_foldable(norm: nn.Module) -> str | None:
    """Return why a batch norm cannot be folded, or None."""
    if type(norm) not in FOLDABLE:
        return f"{type(norm).__name__} is no batch norm"
    return None if getattr(norm, "running_var", None) is not None else "it keeps no running statistics"


def fold(
    norm: Any, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias that compute a layer [output channels first] and its batch norm in one.

    Args:
        norm: a batch norm; its running statistics are used, in training too.
        weight: [Co, ...] of the layer.
        bias: [Co] of the layer, or None.

    >>> conv, norm, x = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3).eval(), torch.randn(4, 2, 5, 5)
    >>> y = torch.conv2d(x, *fold(norm, conv.weight, conv.bias))
    >>> torch.allclose(y, norm(conv(x)), atol=1e-5)
    True
    """
    factor = 1.0 / torch.sqrt(norm.running_var.to(weight.dtype) + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight
    shifted = -norm.running_mean.to(weight.dtype) if bias is None else bias - norm.running_mean.to(weight.dtype)
    moved = shifted * factor
    if norm.bias is not None:
        moved = moved + norm.bias
    return weight * factor.view(-1, *(1,) * (weight.dim() - 1)), moved


def update_statistics(norm: Any, mean: torch.Tensor, variance: torch.Tensor, count: int) -> None:
    """Move the running statistics towards a batch's, as the batch norm would; a batch that is not finite is left out.

    Args:
        norm: a batch norm that keeps running statistics.
        mean, variance: [C] of the batch; the variance is that of the batch itself (divided by ``count``).
        count: values of each channel.
    """
    if not bool((torch.isfinite(mean) & torch.isfinite(variance)).all()):
        return
    norm.num_batches_tracked += 1
    part = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    unbiased = variance * (count / max(count - 1, 1))
    norm.running_mean += part * (mean.to(norm.running_mean.dtype) - norm.running_mean)
    norm.running_var += part * (unbiased.to(norm.running_var.dtype) - norm.running_var)


def folded_output(
    norm: Any,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    batch_output: Callable[[], torch.Tensor],
    product: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
    update: bool,
) -> torch.Tensor:
    r"""Return what layer and batch norm give in training, from the product with weights folded as for inference.

    .. math:: y = \frac{\sigma_\mathrm{EMA}}{\sigma_B}\,(x \cdot \mathrm{fq}(w_\mathrm{fold})) + \beta
              - \frac{\gamma \mu_B}{\sigma_B}

    The batch's statistics are those of a second product with the weights as they are. What is quantized is the weight
    of inference, so its codes do not jitter with the batches.

    Args:
        norm: the batch norm.
        weight, bias: of the layer.
        batch_output: returns the layer's output [N, Co, ...] with the weights as they are, without bias.
        product: returns the quantized product with a weight and a bias.
        update: whether the running statistics may move.
    """
    plain = batch_output().float()
    axes = tuple(axis for axis in range(plain.dim()) if axis != 1)
    mean, variance = plain.mean(axes), plain.var(axes, correction=0)
    if update:
        with torch.no_grad():
            centre = mean if bias is None else mean + bias
            update_statistics(norm, centre.detach(), variance.detach(), plain.numel() // max(plain.shape[1], 1))
    folded, _ = fold(norm, weight, None)
    running = torch.sqrt(norm.running_var.float() + norm.eps)
    deviation = torch.sqrt(variance + norm.eps)
    shift = -mean / deviation if norm.weight is None else -norm.weight * mean / deviation
    if norm.bias is not None:
        shift = shift + norm.bias
    shape = (1, -1, *(1,) * (plain.dim() - 2))
    y = product(folded, None)
    return (y * (running / deviation).view(shape) + shift.view(shape)).to(y.dtype)
