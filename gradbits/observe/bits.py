"""How many bits the gradients have where the backward products take them in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gradbits.nn.layers import QUANTIZED_CLASSES
from gradbits.nn.quantized import Quantized
from gradbits.nn.report import named_layers


def _bits(spec: Any) -> float:
    bits = float(spec.gradient.bits * spec.gradient.grid.digits)
    return bits if spec.sampling is None else bits * float(spec.sampling.keep)


def gradient_bits(model: nn.Module, run: Callable[[], Any]) -> float:
    r"""Return the bits of a gradient element, averaged over all elements that enter a backward product.

    .. math:: \bar b = \frac{\sum_l n_l\,(b_l^\text{grad\_input} + b_l^\text{grad\_weight})/2}{\sum_l n_l}

    with n_l the elements of the gradient of layer l's output. A product in float counts the bits of the output's dtype;
    of several digits each counts its bits, and of sampled rows the expected part that is drawn.

    Args:
        model: a module with Linear, convolution or ``gradbits.nn.Matmul`` layers, quantized or not.
        run: runs the forward pass of ``model`` once.

    >>> import gradbits as gb
    >>> net = nn.Linear(4, 4); _ = gb.quantize_(net, "int8_dynamic")
    >>> gradient_bits(net, lambda: net(torch.ones(2, 4)))
    8.0
    """
    total = [0.0, 0.0]

    def count(layer: nn.Module, args: Any, output: torch.Tensor) -> None:
        width = torch.finfo(output.dtype).bits
        recipe = layer.assignment.recipe if isinstance(layer, Quantized) else None
        for product in ("grad_input", "grad_weight"):
            spec = getattr(recipe, product, None)
            total[0] += output.numel() * (width if spec is None else _bits(spec)) / 2
        total[1] += output.numel()

    layers = [m for _, m in named_layers(model) if isinstance(m, (Quantized, *QUANTIZED_CLASSES))]
    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return total[0] / total[1] if total[1] else 32.0
