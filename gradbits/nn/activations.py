"""Activation memory: everything large that autograd keeps for the backward pass, in few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import nn

from gradbits.core.checks import check_integer
from gradbits.core.errors import ArgumentError
from gradbits.core.grain import PerBlock
from gradbits.core.qtensor import QTensor
from gradbits.kernels.quantize import memory_order
from gradbits.quantizers.grids import Affine
from gradbits.quantizers.quantizer import Quantizer
from gradbits.quantizers.ranges import MinMax

# exp() of what these save is what their backward pass needs: rounding it without bias would not help
LEFT_ALONE = ("SoftmaxBackward0", "LogSoftmaxBackward0")
_NOTE = "gradbits"  # key of what is noted on the nodes of a graph


class Packed:
    """One tensor that autograd saved, in few bits; ``unpack`` gives it back."""

    def __init__(self, tensor: torch.Tensor) -> None:
        order = memory_order(tensor)
        self.order = tuple(range(tensor.dim())) if order is None else order
        self.shape = tensor.permute(self.order).shape
        self.dtype = tensor.dtype

    def flat(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the elements in memory order."""
        return tensor.permute(self.order).reshape(-1)

    def shaped(self, flat: torch.Tensor) -> torch.Tensor:
        """Return elements in memory order as a tensor of the saved shape and strides."""
        inverse = sorted(range(len(self.order)), key=lambda i: self.order[i])
        return flat.view(self.shape).permute(inverse)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        raise NotImplementedError

    def unpack(self) -> torch.Tensor:
        """Return the tensor."""
        raise NotImplementedError


class PackedBits(Packed):
    """Which elements are positive (or True), one bit each."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(tensor)
        positive = self.flat(tensor.detach()) > 0 if tensor.dtype != torch.bool else self.flat(tensor.detach())
        padded = torch.cat([positive, positive.new_zeros(-positive.numel() % 8)]).view(torch.uint8).view(-1, 8)
        self.bits = padded[:, 0].clone()
        for lane in range(1, 8):
            self.bits |= padded[:, lane] << lane

    @property
    def nbytes(self) -> int:
        return self.bits.numel()

    def unpack(self) -> torch.Tensor:
        lanes = torch.stack([(self.bits >> lane) & 1 for lane in range(8)], dim=1).reshape(-1)
        return self.shaped(lanes[: self.shape.numel()].to(self.dtype))


class PackedIndices(Packed):
    """Integers in the smallest signed type that holds them."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(tensor)
        low, high = torch.aminmax(tensor)
        limit = max(-int(low) - 1, int(high))
        small = next((t for t in (torch.int8, torch.int16, torch.int32) if limit <= torch.iinfo(t).max), torch.int64)
        self.values = self.flat(tensor.detach()).to(small)

    @property
    def nbytes(self) -> int:
        return self.values.numel() * self.values.element_size()

    def unpack(self) -> torch.Tensor:
        return self.shaped(self.values.to(self.dtype))


class PackedValues(Packed):
    """Values in groups, each with its own range, stochastically rounded."""

    def __init__(self, tensor: torch.Tensor, quantizer: Quantizer) -> None:
        super().__init__(tensor)
        self.codes: QTensor = quantizer.quantize(self.flat(tensor.detach())).pack()

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes

    def unpack(self) -> torch.Tensor:
        return self.shaped(self.codes.dequantize(self.dtype))


@dataclass
class Tally:
    """Bytes that autograd would have kept, and those that are kept instead; each tensor once."""

    before: int = 0
    after: int = 0


class pack_activations(torch.autograd.graph.saved_tensors_hooks):  # a context, named as torch names its own
    r"""A context in which autograd keeps large tensors in few bits until the backward pass.

    .. math:: \hat{x} = s\,\mathrm{SR}\big((x - \min x)/s\big) + \min x,\qquad s = (\max x - \min x)/(2^b - 1)

    over groups of consecutive elements, rounded stochastically: :math:`E[\hat x] = x`, so gradients of operations
    that are linear in what they save (matrix products, convolutions) stay unbiased; those of batch norm, layer norm and
    GELU are not linear in it and get a small bias. A ReLU needs only which of its outputs are positive: one bit
    each, exactly. Masks take one bit, indices (max pooling) the smallest integer type that holds them, exactly. Two
    layers that save the same tensor share one copy. Left alone are parameters, small tensors, codes of quantized layers
    and what softmax saves.

    Args:
        bits: bits of one value, 2 to 8; stored in 2, 4 or 8.
        group: consecutive elements that share a range.
        min_elements: smaller tensors are left alone.

    >>> x = torch.randn(64, 256, requires_grad=True)
    >>> with pack_activations(bits=4) as packed:
    ...     y = (x * 2).sigmoid().square().sum()
    >>> y.backward(); packed.tally.after < 0.15 * packed.tally.before
    True
    """

    def __init__(self, bits: int = 8, *, group: int = 256, min_elements: int = 1024) -> None:
        check_integer(min_elements, "min_elements", 1)
        if group < 16:
            raise ArgumentError(f"group={group!r}: must be an integer of at least 16, or ranges take more than codes")
        self.quantizer = Quantizer(
            grid=Affine(bits=bits), grain=PerBlock(size=group), range=MinMax(), rounding="stochastic"
        )
        self.min_elements = min_elements
        self.tally = Tally()
        super().__init__(self._pack, lambda kept: kept.unpack() if isinstance(kept, Packed) else kept)

    def __enter__(self) -> pack_activations:  # type: ignore[override]
        """Start packing; return this context, whose ``tally`` says what it saved."""
        super().__enter__()
        return self

    def _pack(self, tensor: torch.Tensor) -> Any:
        size = tensor.numel() * tensor.element_size()
        if not self._worth(tensor):
            if not _is_parameter(tensor):
                self.tally.before += size
                self.tally.after += size
            return tensor
        known = _notes(tensor).get((_NOTE, tensor.output_nr), lambda: None)()
        if known is not None:
            return known
        packed = self._packed(tensor)
        self.tally.before += size
        self.tally.after += packed.nbytes
        return packed

    def _packed(self, tensor: torch.Tensor) -> Packed:
        if tensor.dtype == torch.bool:
            return PackedBits(tensor)
        if not tensor.dtype.is_floating_point:
            return PackedIndices(tensor)
        if self._is_saved_by_relu(tensor):
            return PackedBits(tensor)
        values = PackedValues(tensor, self.quantizer)
        _notes(tensor)[_NOTE, tensor.output_nr] = ref(values)
        return values

    def _is_saved_by_relu(self, tensor: torch.Tensor) -> bool:
        """Whether it is a ReLU that saves its own output: the first to save it, before any layer that takes it."""
        made_by = tensor.grad_fn
        if made_by is None or made_by.name() != "ReluBackward0" or _NOTE in _notes(tensor):
            return False
        _notes(tensor)[_NOTE] = True
        return True

    def _worth(self, tensor: torch.Tensor) -> bool:
        if tensor.numel() < self.min_elements or type(tensor) is not torch.Tensor or tensor.layout != torch.strided:
            return False
        if tensor.dtype in (torch.int64, torch.int32, torch.bool):
            return True
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            return False
        if tensor.grad_fn is not None and tensor.grad_fn.name() in LEFT_ALONE:
            return False
        return not _is_parameter(tensor)


def _is_parameter(tensor: torch.Tensor) -> bool:
    """Whether a tensor stays in memory anyway: a parameter, another leaf with gradient, or a view of one."""
    base = tensor._base if tensor._is_view() and tensor._base is not None else tensor
    return isinstance(base, nn.Parameter) or (base.is_leaf and base.requires_grad)


def _notes(tensor: torch.Tensor) -> dict[Any, Any]:
    """Return the notes on the node that made a tensor: they name it for good, its address may be used again."""
    notes: Any = {} if tensor.grad_fn is None else tensor.grad_fn.metadata
    return notes
