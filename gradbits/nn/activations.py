"""Activation memory: everything large that autograd keeps for the backward pass, in few bits."""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from gradbits.core.checks import check_bits, check_integer
from gradbits.core.packing import packed_width
from gradbits.nn.packed import Again, Bits, Content, Held, Integers, Layout, Packed
from gradbits.nn.packed_groups import Groups, LogProbabilities, Positive, SignedCodes, Unpackable
from gradbits.nn.saved import Kept, kept_as
from gradbits.nn.statistics import Statistics
from gradbits.nn.storages import Memory, Tally, place_of

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
RELU, LOG_SOFTMAX = "ReluBackward0", "LogSoftmaxBackward0"
_NOTE = "gradbits saved its own output"  # key of what is noted on the nodes of a graph


class pack_activations(torch.autograd.graph.saved_tensors_hooks):  # a context, named as torch names its own
    r"""A context in which autograd keeps large tensors in few bits until the backward pass.

    .. math:: \hat{x} = s\,\mathrm{SR}\big((x - l)/s\big) + l,\qquad l \approx \min x,\quad
              s \approx (\max x - \min x)/(2^b - 1)

    over groups of consecutive elements, rounded stochastically: :math:`E[\hat x] = x`, so gradients of operations
    that are linear in what they save (matrix products, convolutions) stay unbiased; those of batch norm, layer norm and
    GELU are not linear in it and get a small bias. A ReLU needs only which of its outputs are positive: one bit
    each, exactly. Masks take one bit, indices (max pooling) the smallest integer type that holds them, exactly. Of a
    log-softmax the probabilities are kept, in which its gradient is linear. Layers that save the same memory share one
    copy. A quantized layer keeps its input's codes, in ``bits`` where they have more, and computes its weight's codes
    again. Left alone are parameters, small tensors, statistics of others (see ``Statistics``), and float tensors that
    hold a value that is not finite.

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
        check_bits(bits, "bits")
        check_integer(group, "group", 16)  # in smaller ones, ranges take more than codes
        check_integer(min_elements, "min_elements", 1)
        self.bits, self.group, self.min_elements = bits, group, min_elements
        self.tally = Tally()
        self._seen: dict[int, Memory] = {}
        self._statistics = Statistics(min_elements)
        super().__init__(self._pack, lambda kept: kept.unpack() if isinstance(kept, (Packed, Held)) else kept)

    def __enter__(self) -> pack_activations:  # type: ignore[override]
        """Start packing; return this context, whose ``tally`` says what it saved."""
        super().__enter__()
        return self

    def __exit__(self, *args: object) -> None:
        """Stop packing; what was packed stays so until the backward pass."""
        self._seen.clear()
        self._statistics.recent.clear()
        super().__exit__(*args)

    def _pack(self, tensor: torch.Tensor) -> Any:
        if _is_parameter(tensor):
            self._statistics.see(tensor)
            return Held.of(tensor)
        if type(tensor) is not torch.Tensor or tensor.layout != torch.strided:
            size = tensor.numel() * tensor.element_size()
            self.tally.before += size
            self.tally.after += size
            return tensor
        memory = self._memory_of(tensor)
        layout = Layout.of(tensor)
        place = place_of(tensor, layout)
        packed = None if place in memory.unpackable else self._packed(tensor, memory, layout, place)
        self._statistics.see(tensor)
        if packed is None:
            self.tally.after += memory.hold()
            return Held.of(tensor)
        return packed

    def _packed(self, tensor: torch.Tensor, memory: Memory, layout: Layout, place: Any) -> Packed | None:
        """Return a tensor in few bits, or None where it is to be kept as it is."""
        kept = kept_as(tensor)
        known = memory.contents.get(place, lambda: None)()
        if known is None and not self._worth(tensor, kept):
            return None
        try:
            if _is_own_output(tensor):
                own = Packed(layout, self._own_output(tensor, layout))
                self.tally.after += own.content.nbytes
                memory.own[place] = ref(own)
                return own
            if known is None:
                known = self._content(tensor, layout, kept)
                memory.contents[place] = ref(known)
                self.tally.after += known.nbytes
        except Unpackable:
            memory.unpackable.add(place)
            return None
        return Packed(layout, known)

    def _memory_of(self, tensor: torch.Tensor) -> Memory:
        """Return what is known of a tensor's memory; counts it when it is seen for the first time."""
        storage = tensor.untyped_storage()
        memory = self._seen.get(storage._cdata)
        if memory is None:
            memory = self._seen[storage._cdata] = Memory(StorageWeakRef(storage), storage.nbytes())
            self.tally.before += memory.nbytes
        return memory

    def _own_output(self, tensor: torch.Tensor, layout: Layout) -> Content:
        """Return what an operation needs of its own output."""
        assert tensor.grad_fn is not None
        if tensor.grad_fn.name() == RELU:
            return Bits(_passes(layout.flat(tensor)))
        return LogProbabilities(layout.flat(tensor), self.bits, self.group)

    def _content(self, tensor: torch.Tensor, layout: Layout, kept: Kept | None) -> Content:
        """Return what is kept of a tensor for whoever saved it."""
        if kept is not None and kept.again is not None:
            compute = kept.again
            return Again(lambda: layout.flat(compute()))
        flat = layout.flat(tensor)
        if tensor.dtype == torch.bool:
            return Bits(flat)
        if not tensor.dtype.is_floating_point and kept is None:
            return Integers(flat)
        relu, positive = self._relu_that_made(tensor if kept is None else kept.signs_of(), layout)
        content: Groups | SignedCodes
        if kept is not None and positive is not None and packed_width(self.bits) == 8:
            content = SignedCodes(flat, positive)
        else:
            content = Groups(flat, self.bits, self.group, whole=kept is not None, positive=positive)
        if relu is not None:  # its bits are in there too
            self.tally.after -= relu.content.nbytes
            relu.content = Positive(content)
        return content

    def _relu_that_made(
        self, value: torch.Tensor | None, layout: Layout
    ) -> tuple[Packed | None, torch.Tensor | None]:
        """Return what a ReLU keeps of its output ``value`` and where that is positive, in the order of ``layout``."""
        if value is None:
            return None, None
        own = Layout.of(value)
        memory = self._seen.get(value.untyped_storage()._cdata)
        relu = None if memory is None else memory.own.get(place_of(value, own), lambda: None)()
        if relu is None or not isinstance(relu.content, Bits) or own.order != layout.order:
            return None, None
        return relu, _passes(own.flat(value))

    def _worth(self, tensor: torch.Tensor, kept: Kept | None) -> bool:
        """Whether a tensor is packed."""
        if tensor.numel() < self.min_elements:
            return False
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            return False  # expanded: it takes less as it is
        if kept is not None:
            layout = Layout.of(tensor)
            few = packed_width(self.bits) < 8
            return few or kept.again is not None or self._relu_that_made(kept.signs_of(), layout)[0] is not None
        if tensor.dtype not in (torch.int64, torch.int32, torch.bool, *FLOATS):
            return False
        return _is_output_of(tensor, RELU, LOG_SOFTMAX) or not self._statistics.has(tensor)


def _is_parameter(tensor: torch.Tensor) -> bool:
    """Whether a tensor stays in memory anyway: a parameter, another leaf with gradient, or a view of one."""
    base = tensor._base if tensor._is_view() and tensor._base is not None else tensor
    return isinstance(base, nn.Parameter) or (base.is_leaf and base.requires_grad)


def _passes(output: torch.Tensor) -> torch.Tensor:
    """Return where a ReLU with that output passes a gradient on, which it does for NaN."""
    return (output <= 0).logical_not_()


def _is_output_of(tensor: torch.Tensor, *names: str) -> bool:
    """Whether an operation of one of these names has computed it."""
    return tensor.grad_fn is not None and tensor.grad_fn.name() in names


def _is_own_output(tensor: torch.Tensor) -> bool:
    """Whether it is a ReLU or log-softmax that saves its own output, not an operation that takes it."""
    made_by: Any = tensor.grad_fn
    if not _is_output_of(tensor, RELU, LOG_SOFTMAX) or _NOTE in made_by.metadata:
        return False
    if made_by._saved_result is not None:  # it was saved before packing began
        return False
    made_by.metadata[_NOTE] = True
    return True
