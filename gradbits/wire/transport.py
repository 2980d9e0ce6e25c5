"""Bytes between ranks: all-to-all and all-gather of messages of any length, counted and timed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

STAGES = ("encode", "network", "decode")


@dataclass(kw_only=True)
class Traffic:
    """What a rank has sent, what plain fp32 would have sent in its place, and where the time went.

    Args:
        sent: bytes that this rank has sent.
        plain: bytes that a ring all-reduce (or reduce-scatter) of the same values in float32 sends per rank.
        seconds: by stage, of ``STAGES``.
    """

    sent: int = 0
    plain: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time of the block to ``stage``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - started


class Transport:
    """Collectives of one process group; every rank must call them in the same order.

    Args:
        group: the process group; None: this process is alone and sends nothing.
        traffic: counts what is sent.
    """

    def __init__(self, group: dist.ProcessGroup | None, traffic: Traffic) -> None:
        self.group = group
        self.traffic = traffic
        self.rank, self.world, self.device = 0, 1, torch.device("cpu")
        if group is None:
            return
        self.rank = dist.get_rank(group)
        self.world = dist.get_world_size(group)
        # gloo moves memory of the host; what is encoded is small, so the way there is cheap
        self.device = torch.device(
            "cpu" if dist.get_backend(group) != "nccl" else f"cuda:{torch.cuda.current_device()}"
        )

    def all_to_all(self, messages: Sequence[torch.Tensor | None], length: int | None) -> list[torch.Tensor]:
        """Send ``messages[r]`` (uint8) to rank r and return what every rank sent here; this rank's own is empty.

        Args:
            messages: one per rank, None at this rank's own place.
            length: bytes of a message where all ranks know that all are equally long; None: sizes are sent ahead.
        """
        if self.world == 1:
            return [torch.empty(0, dtype=torch.uint8)]
        with self.traffic.timed("network"):
            empty = torch.empty(0, dtype=torch.uint8)
            parts = [empty if message is None else message for message in messages]
            sizes = [len(part) for part in parts]
            if length is None:
                coming = self._sizes(torch.tensor(sizes), gather=False)
            else:
                coming = [0 if rank == self.rank else length for rank in range(self.world)]
            received = torch.empty(sum(coming), dtype=torch.uint8, device=self.device)
            dist.all_to_all_single(received, torch.cat(parts).to(self.device), coming, sizes, group=self.group)
            self.traffic.sent += sum(sizes)
            return list(received.cpu().split(coming))

    def all_gather(self, message: torch.Tensor, length: int | None) -> list[torch.Tensor]:
        """Return every rank's message (uint8), this rank's own among them, each perhaps with zeros behind it.

        Args:
            message: of this rank.
            length: as in ``all_to_all``.
        """
        if self.world == 1:
            return [message]
        with self.traffic.timed("network"):
            if length is None:
                # the sizes are near each other, so padding costs little; gloo gathers equal sizes only
                length = max(self._sizes(torch.tensor([len(message)]), gather=True))
            own = torch.zeros(length, dtype=torch.uint8, device=self.device)
            own[: len(message)] = message
            received = torch.empty(self.world, length, dtype=torch.uint8, device=self.device)
            dist.all_gather(list(received), own, group=self.group)
            self.traffic.sent += length * (self.world - 1)
            return list(received.cpu())

    def gather_values(self, values: torch.Tensor) -> torch.Tensor:
        """Return the ranks' ``values`` as [world, ...], the same bits on every rank."""
        if self.world == 1:
            return values[None]
        with self.traffic.timed("network"):
            own = values.to(self.device)
            received = own.new_empty(self.world, *own.shape)
            dist.all_gather(list(received), own, group=self.group)
            self.traffic.sent += own.numel() * own.element_size() * (self.world - 1)
            return received.to(values.device)

    def all_reduce(self, buffer: torch.Tensor) -> None:
        """Replace ``buffer`` by its mean over the ranks, in its own dtype, as DDP does without a hook."""
        if self.world == 1:
            return
        with self.traffic.timed("network"):
            buffer.div_(self.world)
            dist.all_reduce(buffer, group=self.group)
            self.traffic.sent += 2 * (self.world - 1) * buffer.numel() * buffer.element_size() // self.world

    def plain_bytes(self, elements: int) -> int:
        """Return the bytes that a ring all-reduce of ``elements`` float32 values sends per rank."""
        return 8 * (self.world - 1) * elements // self.world

    def _sizes(self, sizes: torch.Tensor, gather: bool) -> list[int]:
        sizes = sizes.to(self.device)
        received = torch.empty(self.world, dtype=torch.int64, device=self.device)
        if gather:
            dist.all_gather(list(received.view(self.world, 1)), sizes, group=self.group)
        else:
            dist.all_to_all_single(received, sizes, group=self.group)
        self.traffic.sent += 8 * (self.world - 1)
        return received.tolist()


def private_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Return a new process group of the same ranks, backend and timeout; every rank of ``group`` must call it.

    Its collectives are issued by another thread than the program's own, so they need an order of their own.
    """
    parent = group if group is not None else dist.group.WORLD
    assert parent is not None
    device = torch.device("cuda" if dist.get_backend(parent) == "nccl" else "cpu")
    timeout = getattr(getattr(parent._get_backend(device), "options", None), "_timeout", None)
    ranks = dist.get_process_group_ranks(parent)
    whole = len(ranks) == dist.get_world_size()
    made = dist.new_group(ranks, timeout, backend=dist.get_backend(parent), use_local_synchronization=not whole)
    assert isinstance(made, dist.ProcessGroup)
    return made
