"""A codec at one step of a run: rows to frames and back, with noise that no other frame shares."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradbits.core.errors import CorruptDataError
from gradbits.core.noise import NoiseKey
from gradbits.wire.codec import Codec, State
from gradbits.wire.frame import from_frame, to_frame
from gradbits.wire.transport import Traffic


@dataclass(kw_only=True)
class Encoder:
    """A codec at one step: its state and the keys of its noise.

    Args:
        codec: without error feedback around it, which the exchange does itself.
        state: of the codec.
        seed: of the run.
        step: number of the step.
        rank, world: of this process.
        traffic: is told the time.
        beta, gamma: factors of residual and gradient under error feedback.
    """

    codec: Codec
    state: State
    seed: int
    step: int
    rank: int
    world: int
    traffic: Traffic
    beta: float = 1.0
    gamma: float = 1.0

    @property
    def fixed_length(self) -> bool:
        """Whether the length of a frame follows from the number of values: entropy coding is a wrapper."""
        return not hasattr(self.codec, "codec")

    def encode(
        self, values: torch.Tensor, group: int, row: int, error: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the frame of ``values``, to be sent to the owner of ``row`` or, by the owner, to all.

        No two frames of a run share noise: the key is made of the seed, step, group, sender and row.

        Args:
            values: flat float32, finite.
            group: index of the group.
            row: index of the row.
            error: receives what the encoding loses.
        """
        if not values.numel():
            return torch.empty(0, dtype=torch.uint8)
        with self.traffic.timed("encode"):
            stream = ((self.step << 20 | group) * self.world + self.rank) * self.world + row
            payload = self.codec.encode(values, NoiseKey.of(self.seed, stream), self.state)
            if error is not None:
                torch.sub(values, self.codec.decode(payload).view(-1), out=error)
            return to_frame(payload)

    def decode(self, frame: torch.Tensor, count: int, device: torch.device) -> torch.Tensor:
        """Return the ``count`` float32 values of a frame.

        Raises:
            CorruptDataError: the frame is damaged or holds something else.
        """
        if not count:
            return torch.empty(0, device=device)
        with self.traffic.timed("decode"):
            payload = from_frame(frame)
            if payload.shape != (count,) or payload.dtype != torch.float32:
                raise CorruptDataError(f"frame: holds {payload.dtype} of shape {list(payload.shape)}, not {count} values")
            return self.codec.decode(payload).to(device)
