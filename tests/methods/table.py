"""The method table: one line a recipe, from which it inherits every generic check of the tests beside it.

A new recipe needs one line in ``METHODS``; a test fails while a published recipe is missing.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import nn

import gradbits as gb
from gradbits.recipes.recipe import Recipe


@dataclass(frozen=True)
class Method:
    """A recipe with options, and what the generic checks must know of it.

    Args:
        name, options: as for ``gradbits.recipe``.
        leaves: layers of ``LAYERS`` that it leaves in float.
        error: largest relative error (2-norm) of output and gradients against the float layer, on ordinary input.
        loss: the loss of the small network after ``STEPS`` steps, relative to the first.
        rate: learning rate of that training.
        own_operands: whether a backward product rounds a forward operand anew; its gradients then estimate those of
            a forward pass with that rounding.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    leaves: tuple[str, ...] = ()
    error: float = 0.05
    loss: float = 0.5
    rate: float = 0.1
    own_operands: bool = False

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.options.items())])

    def recipe(self, layer: str = "") -> Recipe:
        """The recipe for every layer, whatever its place in the model; attention products may have their own."""
        recipe = replace(gb.recipe(self.name, **self.options), keep_float=())
        return recipe.matmul if layer == "matmul" and isinstance(recipe.matmul, Recipe) else recipe


METHODS = [
    Method("qat_int8", leaves=("matmul",)),
    Method("qat_int8", {"weights": "tensor", "activation_bits": 7}, leaves=("matmul",)),
    Method("qat_int8", {"weight_bits": 4, "activation_bits": 4}, leaves=("matmul",), error=0.3, loss=0.8),
    Method("lsq", leaves=("matmul",), error=0.9, loss=0.8),
    Method(
        "lsq",
        {"weight_bits": 8, "activation_bits": 8, "signed_activations": True, "per_channel": True},
        leaves=("matmul",),
        error=0.1,
    ),
    # its products are of normalised values: near the float layer in size and direction only
    Method("ewgs", {"weight_bits": 1, "activation_bits": 1}, leaves=("matmul",), error=3.0, loss=0.9),
    Method("ewgs", {"weight_bits": 8, "activation_bits": 8, "delta": 0.1}, leaves=("matmul",), error=3.0, loss=0.9),
    Method("int8_dynamic"),
    Method("int8_dynamic", {"rows": "row", "share_gradient": False}, own_operands=True),
    Method("int8_dynamic", {"bits": 4}, error=0.6, loss=0.8),
    Method("unified_int8", leaves=("matmul",)),
    Method(
        "unified_int8",
        {"search": "descent", "activation_range": "ema"},
        leaves=("matmul",),
        error=0.1,
        loss=0.7,
        rate=0.02,  # a running range clips activations that grow as fast as at 0.1, and the loss jumps
    ),
    Method("statquant_ptq", error=0.1),
    Method("statquant_psq", {"rows": "sample", "zero": "widen"}, error=0.1),
    Method("statquant_bhq", error=0.3),
    Method("statquant_bhq", {"rows": "sample", "gradient_bits": 3, "grad_weight_grain": "channel"}, error=0.6),
    Method("adaptive_int8", leaves=("matmul",), error=0.1),
    Method(
        "adaptive_int8",
        {"rule": "exact", "update_interval": 2, "grad_input_range": "clip"},
        leaves=("matmul",),
        error=0.2,
    ),
    Method("int4_transformer", leaves=("matmul",), error=0.9, loss=0.8),
    Method(
        "int4_transformer",
        {"sampling": False, "learned_steps": False, "hadamard": 4, "attention": "int8_dynamic"},
        error=0.6,
        loss=0.8,
    ),
]


def problems() -> dict[str, tuple[nn.Module, tuple[torch.Tensor, ...]]]:
    """Small float layers and inputs."""
    torch.manual_seed(0)
    return {
        "linear": (nn.Linear(10, 6), (torch.randn(12, 10),)),
        "tokens": (nn.Linear(9, 5, bias=False), (torch.randn(3, 5, 9),)),
        "conv2d": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (torch.randn(3, 4, 7, 6),)),
        "matmul": (gb.nn.Matmul(), (torch.randn(2, 1, 5, 7), torch.randn(2, 1, 7, 4))),
    }


LAYERS = tuple(problems())
PAIRS = [(method, layer) for method in METHODS for layer in LAYERS if layer not in method.leaves]
each_method = pytest.mark.parametrize("method", METHODS, ids=str)
each_pair = pytest.mark.parametrize(("method", "layer"), PAIRS, ids=str)


def setup(method: Method, layer: str, compute: str = "auto", recipe: Recipe | None = None) -> nn.Module:
    """Return a quantized copy of a layer."""
    module = copy.deepcopy(problems()[layer][0])
    gb.quantize_(module, recipe or method.recipe(), compute=compute, strict=True)
    return module


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether the bits are the same; a state that has seen nothing yet holds NaN."""
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=0, atol=0, equal_nan=True) for k in a)
