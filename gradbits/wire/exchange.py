r"""The exchange of one group of parameters: all-to-all of encoded rows, sum in float32, encode again, all-gather.

With x_i the group's gradient on rank i and row r owned by rank r,

.. math:: \bar x^{(r)} = \tfrac1W\Big(x_r^{(r)} + \sum_{i \ne r} D(E(x_i^{(r)}))\Big), \qquad
          x^{(r)} \leftarrow D(E(\bar x^{(r)}))\ \text{on every rank}

A rank sends W - 1 rows twice: 2 (W - 1) / W encoded gradients, whatever W is. A rank's own part of the sum does not
travel, so it is not encoded. All ranks, the owner too, take what the same bytes decode to, so replicas stay bitwise
equal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gradbits.core.errors import CorruptDataError, NonFiniteError
from gradbits.wire.buffers import GroupBuffers
from gradbits.wire.encoder import Encoder
from gradbits.wire.layout import GroupLayout, Slot
from gradbits.wire.message import Flag, Message, pack, unpack
from gradbits.wire.transport import Transport


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A message that arrived damaged; ``reason`` is known at the receiver only."""

    sender: int
    receiver: int
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an exchange found out.

    Args:
        flags: uint8 per encoded parameter, agreed by all ranks.
        finite: whether all of the group's gradients are finite on all ranks; agreed.
        damage: a message that arrived damaged; None where all were whole.
        offender: index of the first parameter (encoded ones first) that is not finite on this rank.
    """

    flags: torch.Tensor
    finite: bool
    damage: Damage | None = None
    offender: int | None = None


@dataclass(kw_only=True)
class Reduced:
    """The row that this rank owns, averaged over the ranks.

    Args:
        coded: float32, of the parameters that are encoded; finite.
        raw: float32, of the others.
        flags: uint8 per encoded parameter: silent on all ranks, not finite on any.
        culprit: rank whose message arrived damaged; ``reason`` says how it was noticed.
    """

    coded: torch.Tensor
    raw: torch.Tensor
    flags: torch.Tensor
    culprit: int | None = None
    reason: str = ""


def average(buffers: GroupBuffers, encoder: Encoder, transport: Transport) -> Outcome:
    """Replace the group's values by what every rank decodes of their mean.

    A parameter that is not finite on some rank becomes NaN on all. With error feedback, a parameter that is exactly
    zero on all ranks stays zero, and its errors wait: it may have no gradient, and DDP would drop what came for it.

    Args:
        buffers: hold this rank's gradients.
        encoder: for this step.
        transport: of the ranks.
    """
    flags, offender = own_flags(buffers)
    reduced = reduce_rows(buffers, flags, encoder, transport)
    if buffers.pending is not None and buffers.owned is not None:
        reduced.coded.add_(buffers.owned, alpha=encoder.beta)
    _drop_nonfinite(reduced.coded[None], reduced.flags, buffers.layout.coded)  # a sum may be beyond float32
    flags, damage = _spread(buffers, reduced, encoder, transport)
    for index, slot in enumerate(buffers.layout.coded):
        if flags[index]:
            slot.view(buffers.coded).fill_(math.nan if flags[index] & Flag.NONFINITE else 0.0)
            _keep_errors(buffers, slot)
    _clear_padding(buffers, transport.rank)
    finite = not bool((flags & Flag.NONFINITE).any()) and _is_finite(buffers.raw)
    return Outcome(flags=flags, finite=finite, damage=damage, offender=offender)


def reduce_rows(buffers: GroupBuffers, flags: torch.Tensor, encoder: Encoder, transport: Transport) -> Reduced:
    """Send every other rank its row and return the mean of the own one; the buffers' errors are pending afterwards.

    Args:
        buffers: hold this rank's gradients.
        flags: from ``own_flags``.
        encoder: for this step.
        transport: of the ranks.
    """
    layout, rank = buffers.layout, transport.rank
    x, group, device = buffers.coded, layout.index, buffers.coded.device
    error = None
    if buffers.residual is not None:
        buffers.pending = buffers.spare()
        error = buffers.pending[0]
        error[rank] = 0
        buffers.pending[1].zero_()
        x.mul_(encoder.gamma).add_(buffers.residual, alpha=encoder.beta)
        buffers.raw.mul_(encoder.gamma)
        _drop_nonfinite(x, flags, layout.coded)
    messages: list[torch.Tensor | None] = []
    length = None
    for row in range(transport.world):
        if row == rank:
            messages.append(None)
            continue
        frame = _encode(encoder, x[row], layout, row, None if error is None else error[row], flags)
        message = Message(sender=rank, step=encoder.step, group=group, flags=flags, frame=frame, raw=buffers.raw[row])
        messages.append(pack(message))
        length = len(messages[-1])  # type: ignore[arg-type]
    received = transport.all_to_all(messages, length if encoder.fixed_length else None)
    silent, nonfinite = flags & Flag.SILENT, flags & Flag.NONFINITE
    coded, raw = x[rank].clone(), buffers.raw[rank].clone()
    culprit: int | None = None
    reason = ""
    for sender, data in enumerate(received):
        if sender == rank:
            continue
        try:
            message = unpack(
                data, sender=sender, step=encoder.step, group=group, flags=len(flags), raw=layout.raw_width
            )
            encoder.decode_into(message.frame, layout, coded, add=True)
        except CorruptDataError as damage:
            culprit, reason = sender, str(damage)
            continue
        raw += message.raw.to(device)
        silent &= message.flags
        nonfinite |= message.flags & Flag.NONFINITE
    coded /= transport.world
    raw /= transport.world
    return Reduced(coded=coded, raw=raw, flags=silent | nonfinite, culprit=culprit, reason=reason)


def finish_reduced(buffers: GroupBuffers, reduced: Reduced, transport: Transport, offender: int | None) -> Outcome:
    """End an exchange whose mean stays with its owners: put NaN where a rank had it, and agree on what happened."""
    layout, rank = buffers.layout, transport.rank
    _drop_nonfinite(reduced.coded[None], reduced.flags, layout.coded)
    own = torch.tensor([reduced.culprit if reduced.culprit is not None else -1, int(_is_finite(reduced.raw))])
    agreed = transport.gather_values(torch.cat([own, reduced.flags.long()]))
    for line in agreed:
        reduced.flags |= line[2:].to(torch.uint8)
    for index, slot in enumerate(layout.coded):
        if flag := int(reduced.flags[index]):
            part = reduced.coded[slot.start : slot.start + slot.chunk]
            part.fill_(math.nan if flag & Flag.NONFINITE else 0.0)
            _keep_errors(buffers, slot)
    _clear_padding(buffers, rank)
    damage = None
    for receiver, culprit in enumerate(agreed[:, 0].tolist()):
        if culprit >= 0:
            damage = Damage(sender=culprit, receiver=receiver, reason=reduced.reason if receiver == rank else "")
    finite = not bool((reduced.flags & Flag.NONFINITE).any()) and bool(agreed[:, 1].all())
    return Outcome(flags=reduced.flags, finite=finite, damage=damage, offender=offender)


def _spread(
    buffers: GroupBuffers, reduced: Reduced, encoder: Encoder, transport: Transport
) -> tuple[torch.Tensor, Damage | None]:
    """Send the own row to all ranks and fill the buffers with all rows; return flags and what arrived damaged."""
    layout, rank = buffers.layout, transport.rank
    error = None if buffers.pending is None else buffers.pending[1]
    frame = _encode(encoder, reduced.coded, layout, rank, error, reduced.flags)
    message = pack(
        Message(
            sender=rank,
            step=encoder.step,
            group=layout.index,
            flags=reduced.flags,
            frame=frame,
            raw=reduced.raw,
            culprit=reduced.culprit,
        )
    )
    received = transport.all_gather(message, len(message) if encoder.fixed_length else None)
    flags, culprit = reduced.flags.clone(), None
    if reduced.culprit is not None:
        culprit = Damage(sender=reduced.culprit, receiver=rank, reason=reduced.reason)
    for sender, data in enumerate(received):
        try:
            found = unpack(
                data, sender=sender, step=encoder.step, group=layout.index, flags=len(flags), raw=layout.raw_width
            )
            encoder.decode_into(found.frame, layout, buffers.coded[sender])
        except CorruptDataError as damage:
            culprit = Damage(sender=sender, receiver=rank, reason=str(damage))
            continue
        buffers.raw[sender] = found.raw
        flags |= found.flags
        if found.culprit is not None:
            culprit = Damage(sender=found.culprit, receiver=sender)
    return flags, culprit


def own_flags(buffers: GroupBuffers) -> tuple[torch.Tensor, int | None]:
    """Return this rank's flags, and the index of the first parameter that is not finite (encoded ones come first).

    What is not finite among the values to encode is replaced by zeros.
    """
    layout = buffers.layout
    flags = torch.zeros(len(layout.coded), dtype=torch.uint8)
    if buffers.residual is not None:
        for index, slot in enumerate(layout.coded):
            part = slot.view(buffers.coded)
            # looking at one value settles it for nearly every parameter
            if not part[0, 0] and not part.any():
                flags[index] |= Flag.SILENT
    offender = _drop_nonfinite(buffers.coded, flags, layout.coded)
    if offender is None and not _is_finite(buffers.raw):
        bad = next(index for index, slot in enumerate(layout.raw) if not _is_finite(slot.view(buffers.raw)))
        offender = len(layout.coded) + bad
    return flags, offender


def _drop_nonfinite(rows: torch.Tensor, flags: torch.Tensor, slots: tuple[Slot, ...]) -> int | None:
    """Flag the parameters in ``rows`` that are not finite, put zeros in their place, and return the first one."""
    if _is_finite(rows):
        return None
    first = None
    for index, slot in enumerate(slots):
        part = slot.view(rows)
        if not _is_finite(part):
            flags[index] |= Flag.NONFINITE
            part.zero_()
            first = index if first is None else first
    return first


def _encode(
    encoder: Encoder,
    row: torch.Tensor,
    layout: GroupLayout,
    index: int,
    error: torch.Tensor | None,
    flags: torch.Tensor,
) -> torch.Tensor:
    """Return the frame of a row; where a norm is beyond float32, zeros are sent and every parameter is flagged."""
    try:
        return encoder.encode(row, layout, index, error)
    except NonFiniteError:
        flags |= Flag.NONFINITE
        return encoder.encode(row.zero_(), layout, index, error)


def _clear_padding(buffers: GroupBuffers, rank: int) -> None:
    """Forget errors of padding, which signs cannot leave at zero: they are not stored with the parameters."""
    if buffers.pending is not None:
        for slot in buffers.layout.coded:
            slot.clear_padding(buffers.pending[0])
            slot.clear_padding(buffers.pending[1][None], rank)


def _keep_errors(buffers: GroupBuffers, slot: Slot) -> None:
    if buffers.pending is not None and buffers.residual is not None and buffers.owned is not None:
        slot.view(buffers.pending[0]).copy_(slot.view(buffers.residual))
        place = slice(slot.start, slot.start + slot.chunk)
        buffers.pending[1][place] = buffers.owned[place]


def _is_finite(values: torch.Tensor) -> bool:
    if not values.numel():
        return True
    low, high = torch.aminmax(values)  # one pass and no copy; both are NaN where any value is
    return math.isfinite(low.item()) and math.isfinite(high.item())
