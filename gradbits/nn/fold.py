r"""Batch norm folded into the weights of the layer before it, in training as in inference.

.. math:: w_\mathrm{fold} = f w, \qquad b_\mathrm{fold} = \beta + f\,(b - \mathrm{EMA}(\mu_B)), \qquad
          f = \frac{\gamma}{\sqrt{\mathrm{EMA}(\sigma_B^2)+\varepsilon}}
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

FOLDABLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def why_not_foldable(norm: Any, layer: Any = None) -> str | None:
    """Return why a batch norm cannot be folded, or None.

    Args:
        norm: of any class.
        layer: the linear layer or convolution before it; its outputs must be what the norm normalises.
    """
    if type(norm) not in FOLDABLE:
        return f"{type(norm).__name__} is no batch norm"
    if norm.running_var is None:
        return "it keeps no running statistics"
    if layer is None:
        return None
    channels, dims = layer.weight.shape[0], max(layer.weight.dim() - 2, 1)
    if norm.num_features != channels:
        return f"its {norm.num_features} features are not the {channels} outputs of the layer"
    return None if type(norm) is FOLDABLE[dims - 1] else f"{type(norm).__name__} does not normalise the layer's outputs"


def has_outputs_at_axis_1(layer: Any, x: torch.Tensor) -> bool:
    """Whether the outputs of a layer for ``x`` lie along axis 1, which its batch norm normalises."""
    return x.dim() == layer.weight.dim()


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
    channels = plain.shape[1]
    mean, variance = plain.new_zeros(channels), plain.new_ones(channels)
    if plain.numel():
        mean, variance = torch.batch_norm_update_stats(plain.detach(), None, None, 0.0)  # far faster than var_mean
    if update and plain.numel():
        with torch.no_grad():
            centre = mean if bias is None else mean + bias
            update_statistics(norm, centre.detach(), variance, plain.numel() // channels)
    folded, _ = fold(norm, weight, None)
    y = product(folded, None)
    running = torch.sqrt(norm.running_var.float() + norm.eps)
    deviation = torch.sqrt(variance + norm.eps)
    found: torch.Tensor = _Normalised.apply(y, plain, norm.weight, norm.bias, mean, deviation, running)
    return found


class _Normalised(torch.autograd.Function):
    r"""The quantized product ``y``, normalised with the statistics of ``plain``, through which gradients flow too.

    With :math:`G_1 = \sum g` and :math:`G_2 = \sum g y` over a channel's n values:

    .. math:: L_\mu = -\frac{\gamma}{\sigma_B} G_1, \qquad
              L_\sigma = \frac{\gamma \mu_B G_1 - \sigma_\mathrm{EMA} G_2}{\sigma_B^2}, \qquad
              L_x = \frac1n \Big(L_\mu + L_\sigma \frac{x - \mu_B}{\sigma_B}\Big)

    are the derivatives of the loss by the statistics and by the values x of ``plain``.
    One function, because the derivatives of its single operations pass over the output a dozen times.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        plain: torch.Tensor,
        gamma: torch.Tensor | None,
        beta: torch.Tensor | None,
        mean: torch.Tensor,
        deviation: torch.Tensor,
        running: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(y, plain, gamma, mean, deviation, running)
        shift = -mean / deviation if gamma is None else -gamma * mean / deviation
        if beta is not None:
            shift = shift + beta
        return torch.addcmul(_over(shift, y), y, _over(running / deviation, y)).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y, plain, gamma, mean, deviation, running = ctx.saved_tensors
        g = grads[0]
        axes = tuple(axis for axis in range(g.dim()) if axis != 1)
        count = max(g.numel() // max(g.shape[1], 1), 1)
        into_y = g * y
        first, second = g.sum(axes, dtype=torch.float32), into_y.sum(axes, dtype=torch.float32)
        torch.mul(g, _over(running / deviation, g), out=into_y)
        slope = 1.0 if gamma is None else gamma.float()
        by_mean = -slope * first / deviation
        by_deviation = (slope * mean * first - running * second) / deviation.square()
        factor = by_deviation / (count * deviation)
        into_plain = torch.addcmul(_over(by_mean / count - factor * mean, plain), plain, _over(factor, plain))
        into_gamma = None if gamma is None else (-mean / deviation * first).to(gamma.dtype)
        into_beta = first if ctx.needs_input_grad[3] else None
        return into_y, into_plain, into_gamma, into_beta, None, None, None


def _over(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return ``values`` [C] so that they broadcast over ``like`` [N, C, ...]."""
    return values.view(1, -1, *(1,) * (like.dim() - 2))
