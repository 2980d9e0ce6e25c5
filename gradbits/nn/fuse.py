"""Compute in one pass over memory what PyTorch computes in several: batch norms with their ReLU, and GELU."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from gradbits.core.checks import check_module
from gradbits.core.errors import NothingToQuantizeError
from gradbits.nn.gelu import FusedGELU
from gradbits.nn.norm import FLAG, NORMS
from gradbits.nn.sequence import FusedSequential, can_join

FLOAT_CLASSES: dict[type[nn.Module], type[nn.Module]] = {FusedSequential: nn.Sequential, FusedGELU: nn.GELU}


def fuse_(model: nn.Module) -> tuple[str, ...]:
    """Compute batch norms together with the ReLU behind them, and GELUs, in one pass each.

    Found are a ``BatchNorm2d`` that a ``ReLU`` follows in a ``Sequential``, every batch norm that the model passes to
    ``gradbits.nn.norm_relu``, and every ``torch.nn.GELU``. A ``ReLU`` that follows a quantized layer in a
    ``Sequential`` is computed by the layer's kernel where no gradient is wanted. All modules keep their names and
    parameters; a norm or layer that is called without the ReLU gives what it gave before, and so does one that has
    hooks.

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
    joined = False
    for parent in model.modules():
        if _has_pairs(parent):
            parent.__class__ = FusedSequential
            joined = True
    names = []
    for name, module in model.named_modules():
        if type(module) is nn.GELU:
            module.__class__ = FusedGELU
        if isinstance(module, (*NORMS, FusedGELU)):
            module.__dict__.setdefault(FLAG, "wanted")
            names.append(name)
    if not names and not joined:
        raise NothingToQuantizeError(
            "model: has neither batch norm nor GELU, nor a ReLU behind a quantized layer, so there is nothing to fuse"
        )
    return tuple(names)


def _has_pairs(module: nn.Module) -> bool:
    """Return whether ``module`` is a plain ``Sequential`` in which something can be joined with the ReLU behind it."""
    if not isinstance(module, nn.Sequential) or type(module) not in (nn.Sequential, FusedSequential):
        return False
    return any(can_join(first, relu) for first, relu in pairwise(list(module)))


def unfuse_(model: nn.Module) -> None:
    """Undo ``fuse_``.

    >>> net = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())
    >>> _ = fuse_(net); unfuse_(net); type(net[0]).__name__
    'BatchNorm2d'
    """
    check_module(model)
    for module in model.modules():
        module.__class__ = FLOAT_CLASSES.get(type(module), type(module))
        module.__dict__.pop(FLAG, None)


def fused(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that are computed in one pass, as far as a call has shown."""
    return tuple(name for name, module in model.named_modules() if module.__dict__.get(FLAG) == "used")
