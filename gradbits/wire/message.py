"""One message of an exchange: a header, a flag for each parameter, a frame, and values that go uncompressed."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from enum import IntFlag

import torch

from gradbits.core.errors import CorruptDataError

MAGIC = b"gbx1"
# magic, version-independent kind, culprit, sender, step, group, bytes of the frame, checksum of all but the frame
HEADER = struct.Struct("<4sBxHHxxIIII")
DATA, DAMAGED = 0, 1  # kinds
NOBODY = 0xFFFF


class Flag(IntFlag):
    """What a rank says of one parameter's gradient."""

    SILENT = 1  # exactly zero, or there is none
    NONFINITE = 2  # holds NaN or Inf; zeros are encoded in its place


@dataclass(frozen=True, kw_only=True)
class Message:
    """What one rank tells another about one group of parameters.

    Args:
        sender: rank that made it.
        step: number of the step.
        group: index of the group of parameters.
        flags: uint8 [parameters that are encoded], bits of ``Flag``.
        frame: uint8, an encoded tensor; carries its own checksum.
        raw: float32, values that go uncompressed.
        culprit: rank whose message arrived damaged at the sender, None where all were whole.
    """

    sender: int
    step: int
    group: int
    flags: torch.Tensor
    frame: torch.Tensor
    raw: torch.Tensor
    culprit: int | None = None


def pack(message: Message) -> torch.Tensor:
    """Return the message as a flat uint8 tensor on the CPU.

    >>> empty = torch.empty(0)
    >>> bytes_ = pack(Message(sender=1, step=7, group=0, flags=empty.byte(), frame=empty.byte(), raw=empty))
    >>> unpack(bytes_, sender=1, step=7, group=0, flags=0, raw=0).step
    7
    """
    flags, frame, raw = message.flags.cpu(), message.frame.cpu(), message.raw.cpu().contiguous().view(torch.uint8)
    out = torch.empty(HEADER.size + len(flags) + len(raw) + len(frame), dtype=torch.uint8)
    middle, end = HEADER.size + len(flags), HEADER.size + len(flags) + len(raw)
    out[HEADER.size : middle] = flags
    out[middle:end] = raw
    out[end:] = frame
    kind, culprit = (DATA, NOBODY) if message.culprit is None else (DAMAGED, message.culprit)
    fields = (MAGIC, kind, culprit, message.sender, message.step & 0xFFFFFFFF, message.group, len(frame))
    body = out.numpy().data
    HEADER.pack_into(body, 0, *fields, 0)
    HEADER.pack_into(body, 0, *fields, _checksum(body, end))
    return out


def unpack(data: torch.Tensor, *, sender: int, step: int, group: int, flags: int, raw: int) -> Message:
    """Return the message in ``data``, which is at least as long as the message.

    Args:
        data: uint8.
        sender, step, group: who must have sent it, and what it must be about.
        flags, raw: how many there must be.

    Raises:
        CorruptDataError: it is something else, or damaged.
    """
    body = data.numpy().data
    if len(body) < HEADER.size:
        raise CorruptDataError(f"message: has {len(body)} bytes; the header alone has {HEADER.size}")
    magic, kind, culprit, found_sender, found_step, found_group, length, check = HEADER.unpack_from(body, 0)
    middle = HEADER.size + flags
    end = middle + 4 * raw
    if magic != MAGIC or end + length > len(body):
        raise CorruptDataError("message: damaged, its header makes no sense")
    if check != _checksum(body, end):
        raise CorruptDataError("message: damaged, its checksum is wrong")
    if (found_sender, found_step, found_group) != (sender, step & 0xFFFFFFFF, group):
        raise CorruptDataError(
            f"message: of rank {found_sender}, step {found_step}, group {found_group}; must be of rank {sender}, "
            f"step {step}, group {group}"
        )
    return Message(
        sender=sender,
        step=step,
        group=group,
        flags=data[HEADER.size : middle],
        frame=data[end : end + length],
        # a view would start at an address that float32 may not have
        raw=data[middle:end].clone().view(torch.float32),
        culprit=culprit if kind == DAMAGED else None,
    )


def _checksum(body: memoryview, end: int) -> int:
    """Return the checksum of the header without itself, the flags and the raw values."""
    return zlib.crc32(body[HEADER.size : end], zlib.crc32(body[: HEADER.size - 4]))
