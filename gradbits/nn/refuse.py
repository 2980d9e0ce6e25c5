"""Where a quantized layer cannot be called: transforms and tracers that see neither its integers nor its noise."""

from __future__ import annotations

import torch

from gradbits.core.errors import DtypeError, UnsupportedError

FLOAT_MODEL = "gradbits.dequantize_ turns a copy of the model into one that can be"


def refuse_transforms(name: str, x: torch.Tensor) -> None:
    """Refuse a call under ``torch.func``, ``torch.export``, ``torch.jit`` or on the meta device.

    Args:
        name: of the layer.
        x: its input.

    Raises:
        DtypeError: the input is no tensor; ``torch.fx.symbolic_trace`` passes a proxy.
        UnsupportedError: the call cannot work; PyTorch would fail with a message about our code.
    """
    if not isinstance(x, torch.Tensor):
        raise DtypeError(f"input: of layer {name!r} must be a tensor, not {type(x).__name__}")
    if x.is_meta:
        raise UnsupportedError(f"input: layer {name!r} is quantized and cannot run on the meta device: {_without(x)}")
    if torch.jit.is_tracing():
        raise UnsupportedError(f"layer {name!r} is quantized and cannot be traced by torch.jit; {FLOAT_MODEL}")
    if torch.compiler.is_exporting():
        raise UnsupportedError(f"layer {name!r} is quantized and cannot be exported by torch.export; {FLOAT_MODEL}")
    # the private name is what torch.autograd.Function.apply itself asks
    if torch._C._are_functorch_transforms_active():
        raise UnsupportedError(
            f"layer {name!r} is quantized and cannot be transformed by torch.func (grad, vmap, jvp, jacrev): its codes "
            "depend on the whole batch and have no derivative; use backward() and torch.autograd.grad, and "
            "torch.func.functional_call without a transform"
        )


def _without(x: torch.Tensor) -> str:
    return f"scales need values, and a tensor of shape {tuple(x.shape)} there has none; call quantize_ afterwards"


def refuse_script(name: str) -> None:
    """Refuse ``torch.jit.script``.

    Raises:
        UnsupportedError: always.
    """
    raise UnsupportedError(f"layer {name!r} is quantized and cannot be scripted by torch.jit; {FLOAT_MODEL}")
