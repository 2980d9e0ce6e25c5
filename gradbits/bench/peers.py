"""How a model competes: in float32, under bfloat16 autocast, compiled, by a recipe, by another library."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradbits.bench.contest import UnavailableError
from gradbits.kernels import machine
from gradbits.nn import fuse_, quantize_
from gradbits.nn.norm import NORMS
from gradbits.recipes import recipe

FP32, FP32_COMPILED = "fp32 eager", "fp32 compiled"
BF16, BF16_COMPILED = "bf16 eager", "bf16 compiled"
TORCHAO, TORCHAO_COMPILED = "torchao int8 eager", "torchao int8 compiled"
PEERS = (FP32, FP32_COMPILED, BF16, BF16_COMPILED)
OTHERS = (TORCHAO, TORCHAO_COMPILED)
RECIPES = ("int8_dynamic", "unified_int8")
AROUND = " + bf16"  # a recipe in its layers, bfloat16 autocast around them
REFERENCES: dict[str, tuple[str, ...]] = {"fp32": (FP32,), "bf16": (BF16, BF16_COMPILED)}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to compute a model.

    Args:
        name: its name in tables.
        recipe: what its layers follow; None leaves them in float.
        autocast: whether bfloat16 autocast is around the forward pass.
        compiled: whether ``torch.compile`` has it.
        torchao: whether torchao's int8 mixed-precision training computes its linear layers.
        keep_float: in place of the recipe's own, where given.
        fuse: whether ``fuse_`` has its batch norms and GELUs.
    """

    name: str
    recipe: str | None = None
    autocast: bool = False
    compiled: bool = False
    torchao: bool = False
    keep_float: tuple[str, ...] | None = None
    fuse: bool = False

    @property
    def ours(self) -> bool:
        """Whether it is gradbits."""
        return self.recipe is not None

    @property
    def peak(self) -> str:
        """The limit of the machine that its products run against."""
        if self.recipe is not None or self.torchao:
            return "int8"
        return "bf16" if self.autocast else "fp32"

    def prepare(self, model: nn.Module) -> nn.Module:
        """Return a copy of ``model`` that is computed this way.

        Raises:
            UnavailableError: this way is not open here; says why.
        """
        model = copy.deepcopy(model)
        if self.torchao:
            _torchao_(model)
        if self.recipe is not None:
            chosen = recipe(self.recipe)
            kept = chosen.keep_float if self.keep_float is None else self.keep_float
            quantize_(model, chosen.with_overrides({"keep_float": kept}))
        if self.fuse and any(isinstance(module, (*NORMS, nn.GELU)) for module in model.modules()):
            fuse_(model)
        if not self.compiled:
            return model
        if machine.compiler() is None:
            raise UnavailableError("torch.compile needs a C++ compiler, and there is none")
        import torch._dynamo

        torch._dynamo.reset()
        compiled: Any = torch.compile(model)
        found: nn.Module = compiled
        return found

    def around(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of the forward pass."""
        return torch.autocast("cpu", torch.bfloat16) if self.autocast else contextlib.nullcontext()


def variants(
    recipes: tuple[str, ...] = RECIPES,
    *,
    compiled: bool = True,
    torchao: bool = True,
    keep_float: tuple[str, ...] | None = None,
    fuse: bool = True,
) -> tuple[Variant, ...]:
    """Return everybody who computes a model: fp32 and bf16, each recipe alone and within bf16, torchao.

    Args:
        recipes: names of recipes.
        compiled: whether compiled ones take part.
        torchao: whether torchao does.
        keep_float: in place of the recipes' own, where given.
        fuse: whether recipes compete with ``fuse_``.
    """
    all_of = [
        Variant(name=FP32),
        Variant(name=FP32_COMPILED, compiled=True),
        Variant(name=BF16, autocast=True),
        Variant(name=BF16_COMPILED, autocast=True, compiled=True),
    ]
    for name in recipes:
        all_of.append(Variant(name=name, recipe=name, keep_float=keep_float, fuse=fuse))
        all_of.append(Variant(name=name + AROUND, recipe=name, autocast=True, keep_float=keep_float, fuse=fuse))
    if torchao:
        all_of.append(Variant(name=TORCHAO, torchao=True))
        all_of.append(Variant(name=TORCHAO_COMPILED, torchao=True, compiled=True))
    return tuple(v for v in all_of if compiled or not v.compiled)


def _torchao_(model: nn.Module) -> None:
    """Let torchao compute the linear layers of ``model``, in the mode that swaps modules.

    Raises:
        UnavailableError: torchao is not installed, or has nothing to do.
    """
    if not any(isinstance(module, nn.Linear) for module in model.modules()):
        raise UnavailableError("torchao trains linear layers in int8, and there are none")
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        raise UnavailableError("torchao trains linear layers in int8; the convolutions would stay in float")
    try:
        from torchao.prototype.quantized_training import int8_mixed_precision_training
        from torchao.quantization import quantize_ as torchao_quantize_
    except ImportError as error:
        raise UnavailableError("torchao is not installed") from error
    # the default mode, a tensor subclass, left the products in float on CPU in version 0.18
    configuration: Callable[..., Any] = int8_mixed_precision_training
    torchao_quantize_(model, configuration(module_swap=True))
