"""A rank's state as plain tensors by parameter name, and the way back, also to another number of ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gradbits.core.errors import ArgumentError, CorruptDataError

if TYPE_CHECKING:
    from gradbits.wire.layout import Slot
    from gradbits.wire.state import CommState

FORMAT = "gradbits-wire"
VERSION = 1
COUNTS = ("rank", "world", "step", "sent", "plain")
TENSORS = ("codec_state", "residual", "owned")
NEEDED = {"codec", "seed", "due", "residual_scale", "seconds", *COUNTS, *TENSORS}


def snapshot(comm: CommState) -> dict[str, Any]:
    """Return everything that the rank needs to go on.

    ``residual`` holds the rank's errors in the shape of each parameter; ``owned`` the errors of the mean of the part
    that the rank owns, flat.
    """
    residual, owned = {}, {}
    for buffers in comm.groups:
        if buffers.residual is None or buffers.owned is None:
            continue
        for slot in buffers.layout.coded:
            residual[slot.name] = slot.read(buffers.residual, torch.empty(slot.shape)).clone()
            owned[slot.name] = buffers.owned[slot.start : slot.start + slot.chunk].cpu().clone()
    return {
        "format": FORMAT,
        "version": VERSION,
        "codec": comm.codec.to_json(),
        "rank": comm.transport.rank,
        "world": comm.transport.world,
        "step": comm.step,
        "seed": comm.seed,
        "due": comm.due,
        "residual_scale": comm.residual_scale,
        "codec_state": {name: value.cpu().clone() for name, value in comm.codec_state.items()},
        "residual": residual,
        "owned": owned,
        "sent": comm.traffic.sent,
        "plain": comm.traffic.plain,
        "seconds": dict(comm.traffic.seconds),
    }


def restore(comm: CommState, states: Sequence[Mapping[str, Any]]) -> None:
    """Put ``comm`` into the state of ``states``: this rank's own, or those of all ranks.

    Raises:
        ArgumentError, CorruptDataError: see ``CommState.load_state_dict``; ``comm`` is then as it was.
    """
    by_rank = _checked(comm, states)
    rank, world = comm.transport.rank, comm.transport.world
    old_world = int(by_rank[min(by_rank)]["world"])
    if len(by_rank) == 1 and (old_world != world or rank not in by_rank) and old_world > 1:
        raise ArgumentError(
            f"state: of rank {min(by_rank)} of {old_world}; this is rank {rank} of {world}. Give the list of all "
            "ranks' states to go on with another number of ranks"
        )
    if len(by_rank) > 1 and sorted(by_rank) != list(range(old_world)):
        raise ArgumentError(f"state: of the ranks {sorted(by_rank)}; must be those of all {old_world} ranks, once each")
    same = old_world == world
    own = by_rank[rank] if same else by_rank[min(by_rank)]
    slots = {slot.name: (buffers, slot) for buffers in comm.groups for slot in buffers.layout.coded}
    residuals = {}
    for name in own["residual"]:
        if name not in slots or not comm.feedback:
            raise ArgumentError(f"state: has a residual of {name!r}, which this model or codec has not")
        slot = slots[name][1]
        residuals[name] = _own_errors(slot, own) if same else _shared_errors(slot, rank, by_rank)
    for buffers in comm.groups:
        if buffers.residual is not None and buffers.owned is not None:
            buffers.residual.zero_()
            buffers.owned.zero_()
            buffers.rollback()
    for name, (residual, owned) in residuals.items():
        buffers, slot = slots[name]
        assert buffers.residual is not None
        assert buffers.owned is not None
        slot.write(buffers.residual, residual.to(buffers.residual.device))
        buffers.owned[slot.start : slot.start + slot.chunk] = owned.to(buffers.owned.device)
    comm.step, comm.seed, comm.due = int(own["step"]), int(own["seed"]), bool(own["due"])
    comm.residual_scale = float(own["residual_scale"])
    comm.codec_state = {name: value.clone() for name, value in own["codec_state"].items()}
    comm.traffic.sent, comm.traffic.plain = int(own["sent"]), int(own["plain"])
    comm.traffic.seconds.update(own["seconds"])


def _checked(comm: CommState, states: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    by_rank = {}
    for state in states:
        if not isinstance(state, Mapping) or state.get("format") != FORMAT or NEEDED - set(state):
            raise CorruptDataError("state: is not a state of compressed communication")
        if state.get("version") != VERSION:
            raise CorruptDataError(f"state: has version {state.get('version')!r}; this version reads {VERSION}")
        if state["codec"] != comm.codec.to_json():
            raise ArgumentError(f"state: of codec {state['codec']}; this one is {comm.codec.to_json()}")
        _check_values(comm, state)
        if state["rank"] in by_rank:
            raise ArgumentError(f"state: rank {state['rank']} is there twice; must be the ranks' states, once each")
        by_rank[int(state["rank"])] = state
    if not by_rank:
        raise CorruptDataError("state: is an empty list")
    if len({(int(s["world"]), int(s["step"])) for s in by_rank.values()}) > 1:
        raise CorruptDataError("state: the ranks' states are of different runs or steps")
    return by_rank


def _check_values(comm: CommState, state: Mapping[str, Any]) -> None:
    """Refuse what ``snapshot`` never wrote, before anything moves: no tensor that is not finite enters a residual."""
    for name in COUNTS:
        if not isinstance(state[name], int) or state[name] < 0:
            raise CorruptDataError(f"state: {name}={state[name]!r}; must be an integer of at least 0")
    scale = state["residual_scale"]
    if not isinstance(scale, float | int) or not 0 < scale < math.inf:
        raise CorruptDataError(f"state: residual_scale={scale!r}; must be a number above 0")
    if not isinstance(state["seed"], int) or not isinstance(state["due"], bool):
        raise CorruptDataError(f"state: seed={state['seed']!r}, due={state['due']!r}; must be an integer and a bool")
    if not isinstance(state["seconds"], Mapping):
        raise CorruptDataError(f"state: seconds={state['seconds']!r}; must be a mapping")
    for name in TENSORS:
        tensors = state[name]
        if not isinstance(tensors, Mapping) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
            raise CorruptDataError(f"state: {name} is no mapping of tensors")
        if bad := [key for key, t in tensors.items() if not bool(torch.isfinite(t).all())]:
            raise CorruptDataError(f"state: {name} of {bad[0]!r} holds NaN or Inf")
    coded = {slot.name for buffers in comm.groups for slot in buffers.layout.coded} if comm.feedback else set()
    names = set(state["residual"])
    missing = sorted(coded - names) + sorted(names ^ set(state["owned"]))
    if missing and names <= coded:  # names that are not known are of another model
        raise CorruptDataError(f"state: has no residual of {missing[0]!r}")
    known = comm.codec_state
    for name, value in state["codec_state"].items():
        if name not in known or value.shape != known[name].shape or value.dtype != known[name].dtype:
            raise CorruptDataError(f"state: codec_state has {name!r} of shape {list(value.shape)}, not of this codec")


def _own_errors(slot: Slot, state: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    residual, owned = state["residual"][slot.name], state["owned"][slot.name]
    if residual.shape != slot.shape or owned.shape != (slot.chunk,):
        raise ArgumentError(
            f"state: residual of {slot.name!r} has shape {list(residual.shape)}, not {list(slot.shape)}"
        )
    return residual, owned


def _shared_errors(
    slot: Slot, rank: int, by_rank: Mapping[int, Mapping[str, Any]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each old rank's share of the errors for a rank of another number of ranks.

    What will still reach the parameters is the mean of the ranks' residuals plus the owners' errors; every new rank
    takes that mean, and the owners' errors are cut at the new places.
    """
    states = [by_rank[r] for r in sorted(by_rank)]
    residuals = [state["residual"][slot.name] for state in states]
    if any(residual.shape != slot.shape for residual in residuals):
        raise ArgumentError(f"state: residual of {slot.name!r} has not the shape {list(slot.shape)} on every rank")
    mean = torch.stack([residual.double() for residual in residuals]).mean(0).float()
    whole = torch.cat([state["owned"][slot.name] for state in states])[: slot.numel]
    owned = torch.zeros(slot.chunk)
    part = whole[rank * slot.chunk : (rank + 1) * slot.chunk]
    owned[: len(part)] = part
    return mean, owned
