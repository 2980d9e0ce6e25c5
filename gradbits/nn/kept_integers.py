"""The integer model of evaluation is built once, for as long as nothing that it is made of changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gradbits.kernels.dispatch import Request, choose, run


def fingerprint(model: nn.Module) -> tuple[Any, ...] | None:
    """Return what tells the present parameters and buffers of ``model`` from others, or None where that costs too much.

    PyTorch counts changes in place, but not those by ``.data`` or NumPy, so a digest of the memory belongs to it, as in
    ``gradbits.nn.kept_weights``.
    """
    tensors = [*model.parameters(), *model.buffers()]
    plain = all(type(t) in (torch.Tensor, nn.Parameter) and t.device.type == "cpu" for t in tensors)
    if not plain or any(t.is_inference() for t in tensors) or choose("digest", Request("cpu")).backend != "native":
        return None
    return tuple(
        (t.data_ptr(), t._version, t.shape, t.stride(), t.dtype, _digest(t) if t.numel() else 0) for t in tensors
    )


def _digest(tensor: torch.Tensor) -> int:
    return int(run("digest", Request("cpu"), "auto", tensor.detach()))
