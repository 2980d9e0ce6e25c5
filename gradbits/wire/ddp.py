"""Compressed communication for DistributedDataParallel: buckets go into groups of parameters, means come back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from gradbits.core.errors import ArgumentError, GradbitsError, WireError
from gradbits.wire.buffers import GroupBuffers
from gradbits.wire.exchange import Outcome, average
from gradbits.wire.layout import Slot
from gradbits.wire.worker import Worker

if TYPE_CHECKING:
    from gradbits.wire.state import CommState

Future = torch.futures.Future[torch.Tensor]


@dataclass(kw_only=True)
class _Bucket:
    future: torch.futures.Future[torch.Tensor | BaseException]
    buffer: torch.Tensor
    left: int  # parameters whose mean is not there yet

    def settle(self, result: torch.Tensor | BaseException) -> None:
        if not self.future.done():
            self.future.set_result(result)


@dataclass(kw_only=True)
class _Place:
    buffers: GroupBuffers
    slot: Slot
    rows: torch.Tensor


class BucketFlow:
    """Brings buckets into groups of parameters and back, on a thread of its own.

    Args:
        comm: whose codec and residuals are used.
    """

    def __init__(self, comm: CommState) -> None:
        self.comm = comm
        parameters = comm.parameters()
        self._names = {parameter: name for name, parameter in parameters.items()}
        self._places = {
            slot.name: _Place(buffers=buffers, slot=slot, rows=rows)
            for buffers in comm.groups
            for slots, rows in ((buffers.layout.coded, buffers.coded), (buffers.layout.raw, buffers.raw))
            for slot in slots
        }
        self._worker = Worker(inline=next(iter(parameters.values())).device.type == "cuda")
        self._open: list[_Bucket] = []  # of the present backward pass
        self._reset()

    def take(self, bucket: dist.GradBucket) -> Future:
        """Return the future of a bucket's mean."""
        buffer = bucket.buffer()
        if self.comm.transport.world == 1:
            future: Future = torch.futures.Future()
            future.set_result(buffer)
            return future
        if buffer.layout != torch.strided:
            raise ArgumentError("bucket: holds sparse gradients, which are not compressed; use dense ones")
        gradients = [(self._name(p), g) for p, g in zip(bucket.parameters(), bucket.gradients(), strict=True)]
        entry = _Bucket(future=torch.futures.Future(), buffer=buffer, left=len(gradients))
        if not self._open:
            self._worker.submit(self._begin, self._fail)
        self._open.append(entry)
        self._worker.submit(lambda: self._average(entry, gradients), self._fail)
        if bucket.is_last():
            entries, self._open = self._open, []
            self._worker.submit(self._finish, lambda error: _settle(entries, error))
            # runs at the end of this backward pass, before DDP waits for the futures: errors keep their type
            torch.autograd.Variable._execution_engine.queue_callback(self._worker.wait)
        return entry.future.then(_value)

    def _fail(self, error: BaseException) -> None:
        _settle(list(self._open), error)

    def _begin(self) -> None:
        self.comm.begin()
        self._reset()

    def _average(self, entry: _Bucket, gradients: list[tuple[str, torch.Tensor]]) -> None:
        comm = self.comm
        comm.traffic.plain += comm.transport.plain_bytes(entry.buffer.numel())
        if not comm.compressing:
            self._average_plain(entry, gradients)
            return
        for name, gradient in gradients:
            place = self._places[name]
            place.slot.write(place.rows, gradient)
            self._targets[name] = (entry, gradient)
            self._missing[place.buffers.layout.index].discard(name)
        for index in sorted({self._places[name].buffers.layout.index for name, _ in gradients}):
            if not self._missing[index]:
                self._exchange(comm.groups[index])

    def _exchange(self, buffers: GroupBuffers) -> None:
        comm = self.comm
        try:
            comm.observe(buffers)
            self._outcomes.append((buffers, average(buffers, comm.encoder(), comm.transport)))
        except GradbitsError:
            raise
        except Exception as error:
            raise WireError(f"step {comm.step}, {buffers.layout.title}: {_said(error)}") from error
        for slot in (*buffers.layout.coded, *buffers.layout.raw):
            entry, gradient = self._targets.pop(slot.name)
            slot.read(self._places[slot.name].rows, gradient)
            entry.left -= 1
            if not entry.left:
                entry.settle(entry.buffer)

    def _average_plain(self, entry: _Bucket, gradients: list[tuple[str, torch.Tensor]]) -> None:
        comm = self.comm
        try:
            if comm.is_due():
                for name, gradient in gradients:
                    place = self._places[name]
                    place.slot.write(place.rows, gradient)
                    self._missing[place.buffers.layout.index].discard(name)
                    if not self._missing[place.buffers.layout.index]:
                        comm.observe(place.buffers)
            comm.transport.all_reduce(entry.buffer)
        except Exception as error:
            raise WireError(f"step {comm.step}, uncompressed: {_said(error)}") from error
        entry.settle(entry.buffer)

    def _finish(self) -> None:
        comm = self.comm
        try:
            if not comm.compressing:
                comm.finish_plain()
                return
            if missing := sorted(set().union(*self._missing)):
                raise WireError(f"step {comm.step}: DDP gave no gradient for {missing[0]!r}; the model has changed")
            comm.finish(self._outcomes)
        except GradbitsError:
            raise
        except Exception as error:
            raise WireError(f"step {comm.step}, at its end: {_said(error)}") from error

    def _reset(self) -> None:
        self._outcomes: list[tuple[GroupBuffers, Outcome]] = []
        self._targets: dict[str, tuple[_Bucket, torch.Tensor]] = {}
        self._missing = [
            {slot.name for slot in (*buffers.layout.coded, *buffers.layout.raw)} for buffers in self.comm.groups
        ]

    def _name(self, parameter: torch.Tensor) -> str:
        name = self._names.get(parameter)  # type: ignore[call-overload]
        if name is None:
            raise ArgumentError(
                f"state: was made for another model; DDP has a parameter of shape {list(parameter.shape)} that it does "
                "not know"
            )
        return str(name)


def _settle(entries: list[_Bucket], error: BaseException) -> None:
    for entry in entries:
        entry.settle(error)


def _value(future: torch.futures.Future[torch.Tensor | BaseException]) -> torch.Tensor:
    value = future.value()
    if isinstance(value, BaseException):
        raise value
    return value


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
