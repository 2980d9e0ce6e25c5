"""What ``pack_activations`` knows of the storages that tensors were saved of, so that what they share counts once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from gradbits.nn.packed import Content, Layout, Packed


@dataclass
class Tally:
    """Bytes that autograd would have kept, and those that are kept instead; what several tensors share counts once."""

    before: int = 0
    after: int = 0


@dataclass
class Memory:
    """One storage of which something was saved.

    Args:
        holder: keeps its address from being given out again; does not keep its bytes.
        nbytes: its size.
        contents: what was packed of it, by place and version, as long as it is kept.
        own: what operations keep of their own outputs in it, by place and version.
        unpackable: places and versions that have no grid.
        held: whether a tensor was saved as it is.
    """

    holder: StorageWeakRef
    nbytes: int
    contents: dict[Any, ref[Content]] = field(default_factory=dict)
    own: dict[Any, ref[Packed]] = field(default_factory=dict)
    unpackable: set[Any] = field(default_factory=set)
    held: bool = False

    def hold(self) -> int:
        """Note that it stays in memory; return the bytes that this adds."""
        added = 0 if self.held else self.nbytes
        self.held = True
        return added


def place_of(tensor: torch.Tensor, layout: Layout) -> tuple[Any, ...]:
    """Return what names the elements of a tensor within its storage, as they are now."""
    dense = tensor.permute(layout.order).is_contiguous()
    where = None if dense else (tensor.shape, tensor.stride())
    return tensor.storage_offset(), tensor.numel(), tensor.dtype, tensor._version, where
