"""``export.torch_export``: an integer model as a program of PyTorch's own export format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from gradbits.core.checks import check_instance, check_module
from gradbits.core.errors import ArgumentError, GradbitsError, GraphError
from gradbits.core.files import write_atomically
from gradbits.export.onnx_model import as_integer, example


def torch_export(model: nn.Module, args: tuple[torch.Tensor, ...], path: str | Path | None = None) -> ExportedProgram:
    """Return ``torch.export.export`` of a model that was trained with ``qat_int8``; the batch may have any size.

    The program consists of PyTorch's operators alone and gives the integers of ``convert_``, bit for bit.

    Args:
        model: converted by ``convert_``, or in training (a converted copy is exported then).
        args: example arguments; their first axis is the batch, of at least 2 samples.
        path: where the program is written as well (a ``.pt2`` file), whole or not at all; None: nowhere.

    Raises:
        GraphError: the model cannot compute in integers, or ``torch.export`` cannot follow it for a batch of any size.
        ArgumentError: arguments that the model does not take, or fewer than 2 samples.
        DtypeError: a path of a wrong type.
        GradbitsError: the file cannot be written.

    >>> import gradbits as gb
    >>> net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(16, 4)
    >>> _ = gb.quantize_(net, "qat_int8")
    >>> _, net = net(x), gb.convert_(net)
    >>> torch.equal(gb.export.torch_export(net, (x,)).module()(x[:5]), net(x[:5]))
    True
    """
    check_module(model)
    check_instance(path, "path", str, Path, None)
    integer = as_integer(model)
    example(integer, args)
    if (least := min(len(a) for a in args)) < 2:  # torch.export takes sizes of 0 and 1 for constants
        raise ArgumentError(f"args: a batch of {least}; must be at least 2 samples, for a batch of any size")
    batch = Dim("batch")
    shapes: Any = (tuple({0: batch} for _ in args),)
    try:
        with torch.no_grad():
            program = torch.export.export(integer, args, dynamic_shapes=shapes)
    except GradbitsError:
        raise
    except RuntimeError as error:  # the errors of the exporter have no narrower public class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise GraphError(f"model: torch.export cannot follow it for a batch of any size: {reason}") from error
    if path is not None:
        write_atomically(Path(path), lambda file: torch.export.save(program, file))
    return program
