"""Tensors in few bits: what ``pack_activations`` keeps in place of what autograd saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gradbits.kernels.quantize import memory_order

# eight bytes of 0 and 1 times this number have their bits side by side in the product's highest byte
GATHER = 0x0102040810204080


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory: what its elements in memory order need to become it again.

    Args:
        order: its axes from the slowest to the fastest.
        shape: its shape in that order.
        dtype: of its elements.
    """

    order: tuple[int, ...]
    shape: torch.Size
    dtype: torch.dtype

    @staticmethod
    def of(tensor: torch.Tensor) -> Layout:
        """Return the layout of ``tensor``; one that has gaps is laid out anew."""
        order = memory_order(tensor) or tuple(range(tensor.dim()))
        return Layout(order, tensor.permute(order).shape, tensor.dtype)

    def flat(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the elements in memory order, side by side."""
        return tensor.detach().permute(self.order).reshape(-1).contiguous()  # every other element reshapes to a view

    def shaped(self, flat: torch.Tensor) -> torch.Tensor:
        """Return elements in memory order, or that and filling behind them, as the tensor."""
        inverse = sorted(range(len(self.order)), key=lambda i: self.order[i])
        return flat.reshape(-1)[: self.shape.numel()].view(self.shape).permute(inverse).to(self.dtype)


class Content:
    """The elements of a tensor in memory order, in few bits."""

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        raise NotImplementedError

    def flat(self) -> torch.Tensor:
        """Return the elements; more may follow that mean nothing."""
        raise NotImplementedError


class Bits(Content):
    """Zeros and ones, one bit each; exact.

    >>> Bits(torch.tensor([True, False, True])).flat()[:3].tolist()
    [1, 0, 1]
    """

    def __init__(self, bits: torch.Tensor) -> None:
        missing = -bits.numel() % 8
        padded = torch.cat([bits, bits.new_zeros(missing)]) if missing else bits
        if padded.storage_offset() % 8:  # a slice that does not start where eight bytes do
            padded = padded.clone()
        self.bits = ((padded.view(torch.int64) * GATHER) >> 56).to(torch.uint8)

    @property
    def nbytes(self) -> int:
        return self.bits.numel()

    def flat(self) -> torch.Tensor:
        every = torch.arange(256, dtype=torch.uint8, device=self.bits.device)
        lanes = torch.stack([(every >> lane) & 1 for lane in range(8)], dim=1).view(torch.int64).flatten()
        return lanes[self.bits.int()].view(torch.uint8)


class Integers(Content):
    """Integers in the smallest signed type that holds them; exact."""

    def __init__(self, flat: torch.Tensor) -> None:
        low, high = torch.aminmax(flat)
        limit = max(-int(low) - 1, int(high))
        small = next((t for t in (torch.int8, torch.int16, torch.int32) if limit <= torch.iinfo(t).max), torch.int64)
        self.values = flat.to(small)

    @property
    def nbytes(self) -> int:
        return self.values.numel() * self.values.element_size()

    def flat(self) -> torch.Tensor:
        return self.values


class Again(Content):
    """Nothing: the elements are computed again when they are needed."""

    def __init__(self, compute: Callable[[], torch.Tensor]) -> None:
        self.compute = compute

    @property
    def nbytes(self) -> int:
        return 0

    def flat(self) -> torch.Tensor:
        return self.compute()


@dataclass
class Packed:
    """One tensor that autograd saved.

    Args:
        layout: how it lies in memory.
        content: its elements; tensors that share memory share it, and another that holds them too may take its place.
    """

    layout: Layout
    content: Content

    def unpack(self) -> torch.Tensor:
        """Return the tensor."""
        return self.layout.shaped(self.content.flat())


@dataclass
class Held:
    """One tensor that is kept as it is.

    Args:
        tensor: autograd's own would keep the graph alive that keeps it, so one without a graph.
        version: of its memory; autograd itself does not look whether it changed where a hook has kept it.
    """

    tensor: torch.Tensor
    version: int

    @staticmethod
    def of(tensor: torch.Tensor) -> Held:
        """Hold ``tensor``."""
        return Held(tensor if tensor.grad_fn is None else tensor.detach(), tensor._version)

    def unpack(self) -> torch.Tensor:
        """Return the tensor."""
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} that the backward pass needs was changed in place"
            )
        return self.tensor
