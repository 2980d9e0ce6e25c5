"""How the replicas of one network stay together: DDP with a codec, DDP as it is, or an optimizer that talks itself."""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradbits.core.errors import CorruptDataError
from gradbits.train.options import OWN_WIRE, TrainOptions
from gradbits.train.ranks import Ranks
from gradbits.wire import compress_
from gradbits.wire.baselines import BASELINES, count_
from gradbits.wire.feedback import ErrorFeedback


class Counts(Protocol):
    """What every way of averaging keeps count of."""

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank has sent."""

    @property
    def ratio(self) -> float:
        """How many times more float32 would have been."""

    @property
    def seconds(self) -> dict[str, float]:
        """Where the time went."""


class Link:
    """The connection of one network's replicas.

    Args:
        ranks: who takes part.
        model: of this rank; the same on all of them.
        optimizer: of this rank.
        options: say how gradients travel.
    """

    def __init__(self, ranks: Ranks, model: nn.Module, optimizer: torch.optim.Optimizer, options: TrainOptions) -> None:
        self.ranks = ranks
        self.counts: Counts
        self._comm: Any = None
        self._buffers: list[torch.Tensor] = []
        self.module = model
        if options.optimizer in OWN_WIRE:
            self._buffers = [b for b in model.buffers() if b.numel()]
            self.counts = optimizer.comm  # type: ignore[attr-defined]
            return
        # of a weight with one input channel, channels-last and contiguous are the same memory; DDP warns of it
        warnings.filterwarnings("ignore", message="Grad strides do not match", category=UserWarning)
        ddp = DistributedDataParallel(model)
        self.module = ddp
        if options.wire is None or options.wire in BASELINES:
            start = {"start": options.wire_start} if options.wire_start is not None else {}
            self._comm = count_(ddp, options.wire or "none", **start)
        else:
            # the codec has its error feedback, or is not meant to have any
            chosen = options.wire_codec()
            feedback = isinstance(chosen, ErrorFeedback)
            self._comm = compress_(ddp, chosen, feedback=feedback, start=options.wire_start or 0)
        self.counts = self._comm

    def before_forward(self) -> None:
        """Give all ranks the buffers of rank 0, as DDP does: the statistics of batch norm above all."""
        for buffer in self._buffers:
            dist.broadcast(buffer, src=0)

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's part of a checkpoint."""
        return {} if self._comm is None else self._comm.state_dict()

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Take the parts of all ranks, perhaps of another number of them."""
        if self._comm is None or not all(states):
            return
        same = len(states) == self.ranks.world
        if isinstance(states[0], dict) and "baseline" in states[0]:
            self._comm.load_state_dict(states[self.ranks.rank if same else 0])
        elif not hasattr(self._comm, "codec"):
            raise CorruptDataError("state: of a compressed run; this one is not")
        else:
            self._comm.load_state_dict(states)
