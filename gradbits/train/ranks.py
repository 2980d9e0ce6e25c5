"""The processes of a distributed run: who this one is, its share of a batch, and what all agree on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from gradbits.core.errors import ArgumentError, GradbitsError
from gradbits.train.interrupt import Interrupted, StopRequest
from gradbits.train.tasks import Batch, Task

T = TypeVar("T")


class OtherRankError(GradbitsError):
    """Rank 0 has refused the run and says why; this rank ends too, in silence."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The ranks of a run; alone, this process is rank 0 of 1 and nothing is sent.

    Args:
        rank: number of this process.
        world: number of processes.
    """

    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process logs, tests and writes files."""
        return self.rank == 0

    def first(self, action: Callable[[], T]) -> T:
        """Run ``action`` on rank 0 and return its result on every rank.

        Raises:
            GradbitsError: from rank 0; the others raise ``OtherRankError``.
        """
        if self.world == 1:
            return action()
        outcome: list[Any] = [None, None]
        error: Exception | None = None
        if self.leads:
            try:
                outcome[0] = action()
            except (GradbitsError, Interrupted) as found:
                error = found
                outcome[1] = ("signal", found.signal) if isinstance(found, Interrupted) else ("error", str(found))
        dist.broadcast_object_list(outcome, src=0)
        if error is not None:
            raise error
        if outcome[1] is not None:
            kind, value = outcome[1]
            raise Interrupted(value) if kind == "signal" else OtherRankError(value)
        return outcome[0]

    def gather(self, value: T) -> list[T]:
        """Return every rank's value on rank 0; an empty list elsewhere."""
        if self.world == 1:
            return [value]
        found: list[Any] | None = [None] * self.world if self.leads else None
        dist.gather_object(value, found, dst=0)
        return found or []

    def agree(self, loss: float, right: int, stop: StopRequest | None = None) -> tuple[float, int]:
        """Return the mean loss and the sum of right answers over the ranks, and agree on whether to stop.

        A signal reaches the ranks at different steps; all of them stop after the one in which the first has seen it.
        """
        if self.world == 1:
            return loss, right
        wanted = 0 if stop is None else (stop.seen or 0)
        own = torch.tensor([loss, right, wanted], dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(found, own)
        # summed in the order of the ranks, so that all have the same bits
        losses, rights, signals = zip(*(each.tolist() for each in found), strict=True)
        if stop is not None and any(signals):
            stop.signal = int(max(signals))
        return sum(losses) / self.world, int(sum(rights))

    def share(self, batch: Batch) -> Batch:
        """Return this rank's part of a batch."""
        if self.world == 1:
            return batch
        rows = len(batch.inputs) // self.world
        per_row = len(batch.targets) // len(batch.inputs)
        inputs = batch.inputs[self.rank * rows : (self.rank + 1) * rows]
        return Batch(inputs, batch.targets[self.rank * rows * per_row : (self.rank + 1) * rows * per_row])

    def seed(self, seed: int) -> int:
        """Return the seed of this rank's noise: rank 0 has that of a run on one process."""
        return (seed + self.rank * 0x9E3779B97F4A7C15) % (1 << 63)


class SharedTask:
    """A task whose training batches are this rank's shares.

    Args:
        task: the whole.
        ranks: say which share.

    Raises:
        ArgumentError: a batch cannot be shared out evenly.
    """

    def __init__(self, task: Task, ranks: Ranks) -> None:
        if task.batch_size % ranks.world:
            raise ArgumentError(
                f"batch_size={task.batch_size}: must be a multiple of the number of ranks, which is {ranks.world}"
            )
        self._task, self._ranks = task, ranks
        self.metric, self.batch_size, self.steps_per_epoch = task.metric, task.batch_size, task.steps_per_epoch

    def batch(self, seed: int, step: int) -> Batch:
        """Return this rank's share of a step's batch."""
        return self._ranks.share(self._task.batch(seed, step))

    def test_batches(self) -> Iterator[Batch]:
        """Yield the whole test set."""
        return self._task.test_batches()

    def model_arguments(self) -> dict[str, Any]:
        """Return what a model factory may want to know of the data."""
        return self._task.model_arguments()


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` has started, if it has; leave them at the end.

    Raises:
        ArgumentError: the environment is that of a launcher, but not whole, or the ranks cannot be reached.
    """
    try:
        world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    except ValueError as error:
        raise ArgumentError(f"WORLD_SIZE, RANK: must be integers, as torchrun sets them ({error})") from error
    if world <= 1:
        yield Ranks()
        return
    cuda = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArgumentError(f"WORLD_SIZE={world}: the ranks cannot join; start with torchrun: {reason}") from error
    try:
        yield Ranks(rank=rank, world=world)
    finally:
        dist.destroy_process_group()
