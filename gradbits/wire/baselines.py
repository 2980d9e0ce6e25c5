"""PyTorch's own ways of averaging gradients, with what they send counted: what compression is compared with."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    allreduce_hook,
    bf16_compress_hook,
    fp16_compress_hook,
)
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from gradbits.core.checks import check_choice, check_integer
from gradbits.core.errors import CorruptDataError
from gradbits.wire.transport import Traffic

BASELINES = ("none", "fp16", "bf16", "powersgd")
Hook = Callable[[Any, dist.GradBucket], torch.futures.Future[torch.Tensor]]


class Counted:
    """One of PyTorch's hooks, and how many bytes each rank sends through it.

    What is sent is computed, not measured: a ring all-reduce of n bytes sends 2 (W - 1) / W n per rank.

    Args:
        name: of ``BASELINES``; ``"none"`` is the plain all-reduce.
        group: the process group.
        rank: of PowerSGD's factors.
        start: steps that PowerSGD leaves uncompressed, at least 2.
    """

    def __init__(self, name: str, group: dist.ProcessGroup, *, rank: int = 1, start: int = 2) -> None:
        self.name = check_choice(name, "wire", BASELINES)
        self.group = group
        self.world = dist.get_world_size(group)
        self.step = 0
        self.traffic = Traffic()
        self.hook_state: Any = group
        if name == "powersgd":
            self.hook_state = PowerSGDState(
                process_group=group,
                matrix_approximation_rank=check_integer(rank, "rank", 1),
                start_powerSGD_iter=check_integer(start, "start", 2),
            )

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank has sent."""
        return self.traffic.sent

    @property
    def ratio(self) -> float:
        """How many times more an all-reduce in float32 would have sent; 1 before the first."""
        return self.traffic.plain / self.traffic.sent if self.traffic.sent else 1.0

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds from handing a bucket over to having its mean, as ``network``; casts are not told apart."""
        return dict(self.traffic.seconds)

    def state_dict(self) -> dict[str, Any]:
        """Return step and counts; what PowerSGD remembers belongs to DDP's buckets and is not among it."""
        return {"baseline": self.name, "step": self.step, "sent": self.traffic.sent, "plain": self.traffic.plain}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state that ``state_dict`` returned; PowerSGD begins with empty factors and errors again.

        Raises:
            CorruptDataError: the state of something else.
        """
        if state.get("baseline") != self.name:
            raise CorruptDataError(f"state: is not one of the baseline {self.name!r}")
        self.step, self.traffic.sent, self.traffic.plain = state["step"], state["sent"], state["plain"]

    def run(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Average a bucket."""
        started = time.perf_counter()
        numel = bucket.buffer().numel()
        self.traffic.plain += self._ring(4 * numel)
        width = {"fp16": 2, "bf16": 2}.get(self.name, bucket.buffer().element_size())
        before, after = self._powersgd_counts()
        future = _HOOKS[self.name](self.hook_state, bucket)
        if self.name == "powersgd":
            future.wait()  # its collectives follow one another in callbacks: of several buckets they would mix up
        if self._powersgd_counts()[0] > before:
            self.traffic.sent += self._ring(4 * (self._powersgd_counts()[1] - after))
        else:
            self.traffic.sent += self._ring(width * numel)
        if bucket.is_last():
            self.step += 1

        def note(done: torch.futures.Future[torch.Tensor]) -> torch.Tensor:
            self.traffic.seconds["network"] += time.perf_counter() - started
            return done.value()

        return future.then(note)

    def _ring(self, count: int) -> int:
        return 2 * (self.world - 1) * count // self.world

    def _powersgd_counts(self) -> tuple[int, int]:
        """Return how many values PowerSGD has got and sent since it began to compress."""
        if not isinstance(self.hook_state, PowerSGDState):
            return 0, 0
        _, before, after = self.hook_state.compression_stats()
        return before, after


_HOOKS: dict[str, Hook] = {
    "none": allreduce_hook,
    "fp16": fp16_compress_hook,
    "bf16": bf16_compress_hook,
    "powersgd": powerSGD_hook,
}


def count_(ddp: DistributedDataParallel, name: str, **options: Any) -> Counted:
    """Register one of PyTorch's hooks on ``ddp`` and count what it sends.

    Args:
        ddp: has no hook yet.
        name: of ``BASELINES``.
        options: of ``Counted``.
    """
    counted = Counted(name, ddp.process_group, **options)
    ddp.register_comm_hook(counted, _run)
    return counted


def _run(state, bucket):  # type: ignore[no-untyped-def]  # DDP compares annotations with types, and finds texts here
    return state.run(bucket)
