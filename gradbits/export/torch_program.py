"""``export.torch_export``: an integer model as a program of PyTorch's own export format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from gradbits.core.checks import check_module
from gradbits.export.onnx_model import as_integer, example


def torch_export(model: nn.Module, args: tuple[torch.Tensor, ...], path: str | Path | None = None) -> ExportedProgram:
    """Return ``torch.export.export`` of a model that was trained with ``qat_int8``; the batch may have any size.

    The program consists of PyTorch's operators alone and gives the integers of ``convert_``, bit for bit.

    Args:
        model: converted by ``convert_``, or in training (a converted copy is exported then).
        args: example arguments; their first axis is the batch, of at least 2 samples.
        path: where ``torch.export.save`` writes the program as well (a ``.pt2`` file); None: nowhere.

    Raises:
        GraphError: the model cannot compute in integers.
        ArgumentError: arguments that the model does not take.

    >>> import gradbits as gb
    >>> net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(16, 4)
    >>> _ = gb.quantize_(net, "qat_int8")
    >>> _, net = net(x), gb.convert_(net)
    >>> torch.equal(gb.export.torch_export(net, (x,)).module()(x[:5]), net(x[:5]))
    True
    """
    check_module(model)
    integer = as_integer(model)
    example(integer, args)
    batch = Dim("batch")
    shapes: Any = (tuple({0: batch} for _ in args),)
    with torch.no_grad():
        program = torch.export.export(integer, args, dynamic_shapes=shapes)
    if path is not None:
        torch.export.save(program, path)
    return program
