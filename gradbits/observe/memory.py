"""How many bytes a forward pass keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def saved_bytes(model: nn.Module, run: Callable[[], object]) -> int:
    """Return the bytes that ``run``, a forward pass, keeps alive for the backward pass.

    Every storage counts once and whole, however many operations save it or a view of it. Parameters and buffers are
    left out: they stay in memory anyway. What a function keeps by other means than ``save_for_backward`` is not seen,
    nor is what an inner ``saved_tensors_hooks`` context packs.

    Args:
        model: its parameters and buffers are not counted.
        run: computes a loss from the model's output; its result is dropped, no backward pass is made.

    Returns:
        Bytes.

    >>> layer = nn.Linear(8, 4)
    >>> x = torch.ones(16, 8)
    >>> saved_bytes(layer, lambda: layer(x).square().sum())  # x (16*8 floats) and the output (16*4 floats)
    768
    """
    own = {_key(tensor.untyped_storage()) for tensor in (*model.parameters(), *model.buffers())}
    # holding the storages keeps their addresses from being given out twice
    kept: dict[tuple[str, int], torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        key = _key(storage)
        if key not in own and storage.nbytes():
            kept[key] = storage
        return tensor.detach()  # the tensor itself would make a reference cycle with its graph

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in kept.values())


def _key(storage: torch.UntypedStorage) -> tuple[str, int]:
    return str(storage.device), storage.data_ptr()
