"""Compressed communication for FSDP2: gradients are reduce-scattered in few bits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from gradbits.core.errors import ArgumentError, GradbitsError, WireError
from gradbits.wire.buffers import GroupBuffers
from gradbits.wire.codec import Codec
from gradbits.wire.exchange import Outcome, finish_reduced, own_flags, reduce_rows
from gradbits.wire.layout import GroupLayout, Slot, is_coded
from gradbits.wire.state import CommState


def is_fsdp(model: nn.Module) -> bool:
    """Return whether ``fully_shard`` was applied to the module."""
    return isinstance(model, FSDPModule)


def compress_fsdp_(model: nn.Module, codec: str | Codec, **options: Any) -> CommState:
    """Make every part of an FSDP2 model reduce-scatter its gradients in few bits; see ``gradbits.compress_``.

    Parameters that are frozen now take no part.

    Raises:
        ArgumentError: a parameter that is not sharded along its first axis, groups of parameters on several meshes, a
            mesh with replicas, or a model that is compressed already.
    """
    if "process_group" in options:
        raise ArgumentError("process_group: the mesh that fully_shard was given says whose ranks take part")
    parts = [m for m in model.modules() if isinstance(m, FSDPModule)]
    groups = [group for part in parts for group in _state(part)._fsdp_param_groups]
    if not groups:
        raise ArgumentError("model: fully_shard has left it without parameters")
    if any(len(_state(part)._fsdp_param_groups) > 1 for part in parts):
        raise ArgumentError("model: a module shards its parameters over several meshes, which is not supported")
    if any(isinstance(group._reduce_scatter_comm, ReduceScatter) for group in groups):
        raise ArgumentError("model: is compressed already; apply fully_shard anew to compress it otherwise")
    if any(group._is_hsdp for group in groups):
        raise ArgumentError(
            "model: is sharded and replicated (a mesh of two dimensions), and FSDP averages over the replicas in full "
            "width; use a mesh of one dimension"
        )
    process_group = groups[0]._reduce_scatter_process_group
    if any(group._reduce_scatter_process_group.size() != process_group.size() for group in groups):
        raise ArgumentError("model: its modules are sharded over different numbers of ranks, which is not supported")
    comm = CommState(model, codec, process_group=process_group, **options)
    names = {parameter: name for name, parameter in model.named_parameters()}
    layouts, places = [], []
    for index, group in enumerate(groups):
        layout, place = _layout(index, group, names, process_group.size(), comm.min_elements)
        layouts.append(layout)
        places.append(place)
    comm.setup(layouts, groups[0].device)
    steps = _Steps(comm)
    owners = [part for part in parts if _state(part)._fsdp_param_groups]
    for part, buffers, place in zip(owners, comm.groups, places, strict=True):
        part.set_custom_reduce_scatter(ReduceScatter(steps, buffers, place))  # type: ignore[arg-type]
        part.set_force_sum_reduction_for_comms(True)  # so that FSDP divides, by whatever factor was set
    return comm


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a parameter is in a row of FSDP's buffer, and in ours."""

    start: int
    slot: Slot
    coded: bool


class ReduceScatter:
    """What ``set_custom_reduce_scatter`` takes: sums over the ranks, encoded on the way.

    Args:
        steps: of the whole model.
        buffers: of the module.
        places: of its parameters.
    """

    def __init__(self, steps: _Steps, buffers: GroupBuffers, places: Sequence[_Place]) -> None:
        self._steps, self._buffers, self._places = steps, buffers, places

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return memory for FSDP's own buffers."""
        return torch.empty(*size, dtype=dtype, device=device)

    @torch.no_grad()
    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Fill ``output_tensor`` with this rank's part of the sum of all ranks' ``input_tensor``."""
        comm, buffers = self._steps.comm, self._buffers
        self._steps.enter()
        rows = input_tensor.view(comm.transport.world, -1)
        comm.traffic.plain += comm.transport.plain_bytes(input_tensor.numel()) // 2
        whole = sum(place.slot.chunk for place in self._places)
        if rows.shape[1] != whole:
            warnings.warn(
                f"{buffers.layout.title}: a parameter has no gradient, so this step's gradients of the module go "
                "uncompressed",
                stacklevel=2,
            )
        if rows.shape[1] != whole or not comm.compressing:
            self._plain(output_tensor, input_tensor, op)
            return
        for place in self._places:
            target = place.slot.view(buffers.coded if place.coded else buffers.raw)
            target.copy_(rows[:, place.start : place.start + place.slot.chunk])
        try:
            buffers.commit()  # of an earlier exchange in the same backward pass
            comm.observe(buffers)
            flags, offender = own_flags(buffers)
            encoder = comm.encoder()
            reduced = reduce_rows(buffers, flags, encoder, comm.transport)
            outcome = finish_reduced(buffers, reduced, comm.transport, offender)
            comm.check_damage([(buffers, outcome)])
        except GradbitsError:
            raise
        except RuntimeError as error:
            raise _wire_error(comm, buffers.layout.title, error) from error
        self._steps.add(buffers, outcome)
        world = comm.transport.world
        for place in self._places:
            source = reduced.coded if place.coded else reduced.raw
            part = source[place.slot.start : place.slot.start + place.slot.chunk]
            output_tensor[place.start : place.start + place.slot.chunk] = part * world

    def _plain(self, output: torch.Tensor, values: torch.Tensor, op: Any) -> None:
        transport = self._steps.comm.transport
        single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        try:
            single(output, values, op=op, group=transport.group)
        except RuntimeError as error:
            raise _wire_error(self._steps.comm, f"{self._buffers.layout.title}, uncompressed", error) from error
        size = values.numel() * values.element_size()
        transport.traffic.sent += (transport.world - 1) * size // transport.world


class _Steps:
    """The backward passes of a model: errors and levels move at the end of each, or not at all."""

    def __init__(self, comm: CommState) -> None:
        self.comm = comm
        self._open = False
        self._outcomes: list[tuple[GroupBuffers, Outcome]] = []

    def enter(self) -> None:
        """Take part in the present backward pass."""
        if not self._open:
            self._open, self._outcomes = True, []
            self.comm.begin()
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    def add(self, buffers: GroupBuffers, outcome: Outcome) -> None:
        """Note what a module's exchange found out."""
        self._outcomes.append((buffers, outcome))

    def _finish(self) -> None:
        self._open = False
        try:
            if self.comm.compressing and self._outcomes:
                self.comm.finish(self._outcomes)
            else:
                self.comm.finish_plain()
        except GradbitsError:
            raise
        except RuntimeError as error:
            raise _wire_error(self.comm, "at its end", error) from error


def _wire_error(comm: CommState, where: str, error: RuntimeError) -> WireError:
    said = " ".join(str(error).split())[:300]
    return WireError(f"step {comm.step}, {where}: {said}")


def _state(module: nn.Module) -> Any:
    return module._get_fsdp_state()  # type: ignore[operator]


def _layout(
    index: int, group: Any, names: dict[nn.Parameter, str], world: int, min_elements: int
) -> tuple[GroupLayout, list[_Place]]:
    places: list[_Place] = []
    start, widths = 0, {True: 0, False: 0}
    for parameter in group.fsdp_params:
        if not parameter.sharded_param.requires_grad:  # FSDP reduces no gradient of it
            continue
        name = names[parameter.sharded_param]
        if parameter.fsdp_placement.dim != 0:
            raise ArgumentError(f"model: {name!r} is sharded along axis {parameter.fsdp_placement.dim}; must be axis 0")
        shape, chunk = parameter._orig_size, math.prod(parameter.padded_sharded_param_size)
        coded = is_coded(shape, min_elements)
        slot = Slot(name=name, shape=shape, chunk=chunk, start=widths[coded])
        places.append(_Place(start=start, slot=slot, coded=coded))
        widths[coded] += chunk
        start += chunk
    coded_slots = tuple(place.slot for place in places if place.coded)
    raw_slots = tuple(place.slot for place in places if not place.coded)
    return GroupLayout(index=index, world=world, coded=coded_slots, raw=raw_slots), places
