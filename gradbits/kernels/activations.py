"""What an epilogue may apply to a result while it is at hand."""

from __future__ import annotations

import torch

from gradbits.kernels.gelu import CURVES

ACTIVATIONS = ("", "relu", "gelu", "gelu_tanh")  # in the order of native.h
GELU = {"gelu": "none", "gelu_tanh": "tanh"}  # as torch.nn.GELU names its approximations


def activate(y: torch.Tensor, name: str) -> torch.Tensor:
    """Return an activation of float32 ``y``; NaN stays, and what is not positive becomes +0 behind a ReLU.

    Args:
        y: values.
        name: one of ``ACTIVATIONS``; the empty one changes nothing.

    >>> activate(torch.tensor([-1.0, 2.0]), "relu").tolist()
    [0.0, 2.0]
    """
    if name == "relu":
        return torch.where(y <= 0.0, 0.0, y)
    return y * CURVES[GELU[name]][0].share(y) if name else y
