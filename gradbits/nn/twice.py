"""Second derivatives through quantized layers: a context in which they compute in float on the discretized values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gradbits.nn.assigned import Assigned

Seen = dict[tuple[str, str], torch.Tensor]


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[Seen]:
    """A context in which the quantized layers of ``model`` can be differentiated twice.

    Integer products have no second derivative, and outside of this context quantized layers refuse ``create_graph``.
    Inside, the forward pass takes the same quantized values through float products, with plain straight-through
    rounding; what learned ranges remember stays as it is.

    Args:
        model: quantized; not wrapped by a data-parallel module, whose hooks expect one backward pass.

    Yields:
        A dictionary that each forward pass fills: (name of the layer, ``"input"`` or ``"weight"``) -> the discretized
        tensor, a node of the graph. A layer that runs several times leaves its latest.

    >>> import gradbits as gb
    >>> net = nn.Sequential(nn.Linear(3, 2), nn.Softplus()); _ = gb.quantize_(net, "int8_dynamic")
    >>> with twice_differentiable(net) as seen:
    ...     loss = net(torch.ones(1, 3)).square().sum()
    >>> (g,) = torch.autograd.grad(loss, seen["0", "weight"], create_graph=True); g.requires_grad
    True
    """
    seen: Seen = {}

    def note(layer: str, role: str, discretized: torch.Tensor) -> None:
        seen[layer, role] = discretized

    assignments = [m.assignment for m in model.modules() if isinstance(m, Assigned)]
    before = [a.seen for a in assignments]
    for assignment in assignments:
        assignment.seen = note
    try:
        yield seen
    finally:
        for assignment, old in zip(assignments, before, strict=True):
            assignment.seen = old
