"""A codec at one step of a run: rows to frames and back, with noise that no other frame shares."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradbits.core.errors import CorruptDataError
from gradbits.core.noise import NoiseKey
from gradbits.wire.codec import Codec, State
from gradbits.wire.frame import from_frame, to_frame
from gradbits.wire.layout import GroupLayout
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
        self, values: torch.Tensor, layout: GroupLayout, row: int, error: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the frame of ``values``, to be sent to the owner of ``row`` or, by the owner, to all.

        No two frames of a run share noise: the key is made of the seed, step, group, sender and row.

        Args:
            values: flat float32, finite.
            layout: of the group.
            row: index of the row.
            error: receives what the encoding loses.
        """
        frames = []
        stream = ((self.step << 20 | layout.index) * self.world + self.rank) * self.world + row
        with self.traffic.timed("encode"):
            for index, piece in enumerate(self._pieces(layout)):
                key = NoiseKey.of(self.seed + index, stream)
                payload = self.codec.encode(values[piece], key, self.state)
                if error is not None:
                    lost = error[piece]
                    self.codec.decode_into(payload, lost)
                    torch.sub(values[piece], lost, out=lost)
                frames.append(to_frame(payload))
            return frames[0] if len(frames) == 1 else _join(frames)

    def decode_into(self, frame: torch.Tensor, layout: GroupLayout, out: torch.Tensor, *, add: bool = False) -> None:
        """Write the row of values that ``encode`` made the frame of to ``out``, or add them.

        Args:
            frame: of the row.
            layout: of the group.
            out: the row, flat contiguous float32.
            add: whether ``out`` keeps what it holds.

        Raises:
            CorruptDataError: the frame is damaged or holds something else; ``out`` may have been changed in part.
        """
        pieces = self._pieces(layout)
        with self.traffic.timed("decode"):
            frames = [frame] if len(pieces) == 1 else _split(frame, len(pieces))
            for piece, part in zip(pieces, frames, strict=True):
                payload, count = from_frame(part), piece.stop - piece.start
                if payload.shape != (count,) or payload.dtype != torch.float32:
                    found = f"{payload.dtype} of shape {list(payload.shape)}"
                    raise CorruptDataError(f"frame: holds {found}, not {count} values")
                self.codec.decode_into(payload, out[piece], add=add)

    def _pieces(self, layout: GroupLayout) -> list[slice]:
        """Return what is encoded at once: a row where a codec has buckets, else each parameter with its own scale."""
        if not layout.coded:
            return []
        codec = self.codec
        while hasattr(codec, "codec"):
            codec = codec.codec
        if hasattr(codec, "bucket"):
            return [slice(0, layout.coded_width)]
        return [slice(slot.start, slot.start + slot.chunk) for slot in layout.coded]


def _join(frames: list[torch.Tensor]) -> torch.Tensor:
    """Return the frames behind a table of their lengths."""
    if not frames:
        return torch.empty(0, dtype=torch.uint8)
    return torch.cat([torch.tensor([len(frame) for frame in frames]).view(torch.uint8), *frames])


def _split(data: torch.Tensor, count: int) -> list[torch.Tensor]:
    if len(data) < 8 * count:
        raise CorruptDataError(f"frame: {len(data)} bytes are too few for {count} parameters")
    sizes = data[: 8 * count].clone().view(torch.int64).tolist()
    if any(size < 0 for size in sizes) or sum(sizes) != len(data) - 8 * count:
        raise CorruptDataError("frame: damaged, its lengths make no sense")
    return list(data[8 * count :].split(sizes))
