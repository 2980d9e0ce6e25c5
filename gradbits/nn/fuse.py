"""Compute in one pass over memory what PyTorch computes in several: batch norms with their ReLU, and GELU."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from gradbits.core.checks import check_module
from gradbits.core.errors import NothingToQuantizeError
from gradbits.nn.activated import FollowingReLU, follow_
from gradbits.nn.gelu import FusedGELU
from gradbits.nn.norm import FLAG, NORMS, FusedBatchNorm2d, FusedReLU

FLOAT_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    FusedBatchNorm2d: nn.BatchNorm2d,
    FusedReLU: nn.ReLU,
    FusedGELU: nn.GELU,
    FollowingReLU: nn.ReLU,
}


def fuse_(model: nn.Module) -> tuple[str, ...]:
    """Compute batch norms together with the ReLU behind them, and GELUs, in one pass each.

    Found are a ``BatchNorm2d`` that a ``ReLU`` follows in a ``Sequential``, every batch norm that the model passes to
    ``gradbits.nn.norm_relu``, and every ``torch.nn.GELU``. A ``ReLU`` that follows a quantized layer in a
    ``Sequential`` is computed by the layer's kernel where no gradient is wanted. All modules keep their names and
    parameters.

    Args:
        model: changed in place; ``unfuse_`` undoes it.

    Returns:
        The names of the batch norms and GELUs that may be fused; ``report`` lists those that are.

    Raises:
        NothingToQuantizeError: the model has none of them.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.GELU())
    >>> fuse_(net)
    ('1', '3')
    """
    check_module(model)
    followed = False
    for parent in model.modules():
        if type(parent) is nn.Sequential:
            children = list(parent)
            for first, relu in pairwise(children):
                if type(first) is nn.BatchNorm2d and type(relu) is nn.ReLU:
                    first.__class__, relu.__class__ = FusedBatchNorm2d, FusedReLU
                followed = follow_(first, relu) or followed
    names = []
    for name, module in model.named_modules():
        if type(module) is nn.GELU:
            module.__class__ = FusedGELU
        if isinstance(module, (*NORMS, FusedGELU)):
            module.__dict__.setdefault(FLAG, "wanted")
            names.append(name)
    if not names and not followed:
        raise NothingToQuantizeError(
            "model: has neither batch norm nor GELU, nor a ReLU behind a quantized layer, so there is nothing to fuse"
        )
    return tuple(names)


def unfuse_(model: nn.Module) -> None:
    """Undo ``fuse_``.

    >>> net = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())
    >>> _ = fuse_(net); unfuse_(net); type(net[0]).__name__
    'BatchNorm2d'
    """
    check_module(model)
    for module in model.modules():
        module.__class__ = FLOAT_CLASSES.get(type(module), type(module))
        if (assignment := getattr(module, "assignment", None)) is not None:
            assignment.activation = ""
        module.__dict__.pop(FLAG, None)


def fused(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that are computed in one pass, as far as a call has shown."""
    return tuple(name for name, module in model.named_modules() if module.__dict__.get(FLAG) == "used")
