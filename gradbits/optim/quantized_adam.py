r"""Quantized Adam with error feedback: moments stay at the workers, updates and weights travel in few bits (GQEF)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from gradbits.core.checks import check_integer, check_number
from gradbits.core.errors import ArgumentError, CorruptDataError, WireError
from gradbits.optim.stored import as_stored, check_ranks, check_stored, check_wire, merge_parts
from gradbits.optim.wired import (
    Agreed,
    add_group,
    agree,
    broadcast_parameters,
    check_dense,
    check_params,
    named_parameters,
    take_gradient,
)
from gradbits.wire import CommState
from gradbits.wire.buffers import GroupBuffers
from gradbits.wire.codec import Codec
from gradbits.wire.encoder import Encoder
from gradbits.wire.layout import Slot
from gradbits.wire.message import Message, pack, unpack
from gradbits.wire.methods.log_grid import LogGrid
from gradbits.wire.methods.uniform_grid import UniformGrid

TINY = 1e-30  # v of a coordinate that has never had a gradient may underflow


class QuantizedAdam(torch.optim.Optimizer):
    r"""Adam whose workers send quantized updates, with error feedback, and receive quantized weights.

    Worker i, with its own moments and its own error; the gradient is taken at the quantized weights:

    .. math::
        v_i &\leftarrow \theta\,v_i + (1 - \theta)\,g_i^2, \qquad m_i \leftarrow \beta\,m_i + (1 - \beta)\,g_i \\
        u_i &= \alpha\,m_i / \sqrt{v_i}, \qquad d_i = Q_g(u_i + e_i), \qquad e_i \leftarrow u_i + e_i - d_i

    Server: :math:`x \leftarrow x - \tfrac1N\sum_i d_i`, and all workers go on at :math:`\hat x = Q_x(x)`. There is no
    bias correction, and :math:`\epsilon` is the first value of v, not a part of the denominator.

    The ranks of the process group are the workers, and each of them is the server of its part of every parameter: one
    all-to-all of encoded updates, one all-gather of encoded weights; each part of a parameter has a scale of its own.
    Without a process group there is one worker. Do not wrap the model in DDP: gradients stay where they are. Parameters
    below ``min_elements``, and vectors below 64 times as many, are not quantized. **The parameters are replaced by**
    :math:`Q_x(x)` **when the optimizer is made**, so build it last, on every rank. All ranks begin with the parameters
    of rank 0 (buffers, such as those of batch norm, stay each rank's own). Parameters that do not require a gradient
    when it is made are left as they are; so is, in each step, one without gradient on any rank: what it owes waits.

    Args:
        params: parameters, named parameters or groups of them.
        lr: :math:`\alpha`; schedulers may change it, since errors are in units of x.
        beta: of the first moment, in [0, 1).
        theta: of the second moment, in [0, 1].
        eps: :math:`\epsilon`, first value of v, above 0.
        weight_decay: decoupled, applied by the server: :math:`x \leftarrow (1 - \alpha\lambda)\,x`.
        update: :math:`Q_g`, a codec; None sends float32.
        weight: :math:`Q_x`, a codec; None sends float32. ``UniformGrid(k=6, clip_range=0.5)`` is the absolute range
            that is ascribed to the paper; the default takes the range of each parameter's part.
        min_elements: parameters with fewer are not quantized.
        process_group: the workers; None: the default group, or this process alone where there is none.

    A step in which a gradient (or its square) is not finite on any worker changes nothing on any; ``skipped`` counts
    them. A GradScaler leaves that decision, and unscaling, to the optimizer; its scale is that of its own rank.

    Raises:
        ArgumentError, DtypeError: an option that is not legal; parameters that differ between ranks.

    References:
        Chen et al., Quantized Adam with Error Feedback, arXiv:2004.14180. Grids and schedules are the ones commonly
        ascribed to it.

    >>> weight = torch.nn.Parameter(torch.ones(40, 40))
    >>> optimizer = QuantizedAdam([weight], lr=0.1)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> bool((weight < 1).all())
    True
    """

    _step_supports_amp_scaling = True  # GradScaler calls step() on every rank, whatever its own gradients are

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        beta: float = 0.9,
        theta: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        update: Codec | None = LogGrid(k=2),  # noqa: B008  # frozen
        weight: Codec | None = UniformGrid(k=6),  # noqa: B008
        min_elements: int = 1024,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        defaults = {"lr": lr, "beta": beta, "theta": theta, "eps": eps, "weight_decay": weight_decay}
        self._ready = False
        super().__init__(check_params(params), defaults)
        for codec, name in ((update, "update"), (weight, "weight")):
            if codec is not None and not isinstance(codec, Codec):
                raise ArgumentError(f"{name}={codec!r}: must be a codec or None")
        self.update, self.weight = update, weight
        self.skipped = 0
        self._parameters = named_parameters(self)
        self.comm = CommState(
            self._parameters,
            update or LogGrid(),
            feedback=False,
            # nothing is encoded where neither way is
            min_elements=check_integer(min_elements, "min_elements", 1),
            process_group=process_group,
        )
        self.comm.setup()
        broadcast_parameters(self._parameters, self.comm.transport)
        self._group_of = {p: group for group in self.param_groups for p in group["params"]}
        for buffers in self.comm.groups:
            self._start(buffers)
        self._ready = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; possible only while the optimizer is made."""
        if self._ready:
            raise ArgumentError("param_group: QuantizedAdam takes all groups when it is made")
        add_group(super().add_param_group, param_group)
        _check_group(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one step on every worker; all ranks must call it together.

        Args:
            closure: computes the loss again and returns it.

        Raises:
            UnsupportedError: a gradient is sparse; nothing has been sent.
            WireError: an exchange failed; names the step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_dense(self._parameters)
        try:
            agreed = agree(self, self._parameters, self.comm.transport)
            if agreed is None:
                self.skipped += 1
                return loss
            for buffers in self.comm.groups:
                self._step_group(buffers, agreed)
        except (RuntimeError, CorruptDataError) as error:
            raise WireError(f"step {self.comm.step}: {' '.join(str(error).split())[:300]}") from error
        self.comm.step += 1
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this worker: ``m``, ``v``, ``e`` in the shape of each parameter, ``x`` its part of it.

        Every rank has its own state; ``load_ranks`` takes those of all.
        """
        traffic = self.comm.traffic
        counts = {"step": self.comm.step, "sent": traffic.sent, "plain": traffic.plain, "skipped": self.skipped}
        place = {"rank": self.comm.transport.rank, "world": self.comm.transport.world}
        return {**super().state_dict(), "wire": {**counts, **place}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this worker's state; the parameters become :math:`Q_x(x)` again, which all ranks must do together.

        Raises:
            ArgumentError: the state of another rank, of another number of ranks, or of other parameters.
            CorruptDataError, DtypeError: a state of something else, or a damaged one. The optimizer is then as it was.
        """
        found, transport = check_wire(self, state_dict, "state_dict"), self.comm.transport
        if found != (transport.rank, transport.world):
            raise ArgumentError(
                f"state_dict: of rank {found[0]} of {found[1]}; this is rank {transport.rank} of "
                f"{transport.world}. load_ranks takes the states of all ranks"
            )
        check_stored(self, self._parameters, state_dict, self._shapes(transport.world), _check_group, "state_dict")
        wire = state_dict["wire"]
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "wire"})
        as_stored(self, state_dict)
        self._group_of = {p: group for group in self.param_groups for p in group["params"]}
        self.comm.step, self.skipped = wire["step"], wire["skipped"]
        self.comm.traffic.sent, self.comm.traffic.plain = wire["sent"], wire["plain"]
        with torch.no_grad():
            for buffers in self.comm.groups:
                self._publish(buffers)

    def load_ranks(self, states: Sequence[dict[str, Any]]) -> None:
        """Take the states of all workers, perhaps of another number of them.

        As many as before go on bit for bit. Otherwise each new worker takes the mean of the old moments and errors, so
        that :math:`x - \\frac1N\\sum_i e_i` stays what it was, and the parts of x are cut anew.

        Raises:
            ArgumentError, CorruptDataError, DtypeError: as ``load_state_dict``; not the states of all ranks.
        """
        transport, states = self.comm.transport, check_ranks(states)
        found = [check_wire(self, state, "states") for state in states]
        if found != [(rank, len(states)) for rank in range(len(states))]:
            have = ", ".join(f"{rank} of {world}" for rank, world in found)
            raise ArgumentError(f"states: of the ranks {have}; must be those of all ranks, once each, in their order")
        for state in states:
            check_stored(self, self._parameters, state, self._shapes(len(states)), _check_group, "states")
        if len(states) == transport.world:
            self.load_state_dict(dict(states[transport.rank]))
            return
        merged = copy.deepcopy(dict(states[0]))
        numbers = [number for group in merged["param_groups"] for number in group["params"]]
        number_of = dict(zip((p for group in self.param_groups for p in group["params"]), numbers, strict=True))
        for name, slot in self._slots().items():
            number = number_of[self._parameters[name]]
            parts = [state["state"][number] for state in states]
            merged["state"][number] = merge_parts(parts, slot, transport.rank)
        merged["wire"] = {**merged["wire"], "rank": transport.rank, "world": transport.world}
        self.load_state_dict(merged)

    def _shapes(self, world: int) -> Callable[[torch.nn.Parameter], dict[str, torch.Size]]:
        """Return a function that returns the shapes of a parameter's states where there are ``world`` ranks."""
        return lambda p: {**dict.fromkeys("mve", p.shape), "x": torch.Size([-(-p.numel() // world)])}

    def _slots(self) -> dict[str, Slot]:
        return {s.name: s for b in self.comm.groups for s in (*b.layout.coded, *b.layout.raw)}

    def _rows(self, buffers: GroupBuffers) -> list[tuple[Slot, torch.Tensor]]:
        layout = buffers.layout
        return [*((s, buffers.coded) for s in layout.coded), *((s, buffers.raw) for s in layout.raw)]

    @torch.no_grad()
    def _start(self, buffers: GroupBuffers) -> None:
        """Make the states and go to the quantized weights; all ranks hold the same ones, so nothing is sent."""
        rank = self.comm.transport.rank
        for slot, rows in self._rows(buffers):
            parameter = self._parameters[slot.name]
            like = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
            slot.write(rows, parameter)
            self.state[parameter] = {
                "m": like,
                "v": torch.full_like(like, self._group_of[parameter]["eps"]),
                "e": like.clone(),
                "x": slot.view(rows)[rank].clone(),
            }
        encoder = self._encoder(self.weight)
        if encoder is not None and buffers.layout.coded:
            for row in range(len(buffers.coded)):
                frame = encoder.encode(buffers.coded[row], buffers.layout, row)
                encoder.decode_into(frame, buffers.layout, buffers.coded[row])
        self._read(buffers)

    def _step_group(self, buffers: GroupBuffers, agreed: Agreed) -> None:
        for slot, rows in self._rows(buffers):
            if slot.name in agreed.silent:
                slot.view(rows).zero_()
            else:
                slot.write(rows, self._wanted(self._parameters[slot.name], agreed))
        transport, layout = self.comm.transport, buffers.layout
        self.comm.traffic.plain += transport.plain_bytes(layout.numel)
        coded, raw = self._mean_updates(buffers, agreed)
        for slots, mean in ((layout.coded, coded), (layout.raw, raw)):
            for slot in slots:
                if slot.name in agreed.silent:
                    continue
                parameter = self._parameters[slot.name]
                group, x = self._group_of[parameter], self.state[parameter]["x"]
                x.mul_(1 - group["lr"] * group["weight_decay"]).sub_(mean[slot.start : slot.start + slot.chunk])
        self._publish(buffers)

    def _wanted(self, parameter: torch.nn.Parameter, agreed: Agreed) -> torch.Tensor:
        """Return u + e, the moments being moved; a parameter without gradient here wants what it still owes."""
        group, state = self._group_of[parameter], self.state[parameter]
        gradient = take_gradient(parameter, agreed)
        if gradient is None:
            return state["e"]
        state["v"].mul_(group["theta"]).addcmul_(gradient, gradient, value=1 - group["theta"])
        state["m"].mul_(group["beta"]).add_(gradient, alpha=1 - group["beta"])
        # a coordinate without any gradient so far is 0 / 0 where theta is 0
        return group["lr"] * state["m"] / state["v"].clamp(min=TINY).sqrt() + state["e"]

    def _mean_updates(self, buffers: GroupBuffers, agreed: Agreed) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean of the workers' quantized updates of the part that this rank serves; errors are kept."""
        transport, layout, encoder = self.comm.transport, buffers.layout, self._encoder(self.update)
        error = torch.zeros_like(buffers.coded)
        messages: list[torch.Tensor | None] = []
        own = buffers.coded[transport.rank]
        for row in range(transport.world):
            frame, values = self._frame(encoder, buffers, buffers.coded[row], row, error[row])
            if row == transport.rank:
                if encoder is not None:
                    own = torch.empty_like(own)
                    encoder.decode_into(frame, layout, own)
                messages.append(None)
            else:
                messages.append(pack(self._message(buffers, frame, torch.cat([values, buffers.raw[row]]))))
        received = transport.all_to_all(messages, self._length(messages))
        coded, raw = torch.zeros_like(own), torch.zeros_like(buffers.raw[0])
        for sender, data in enumerate(received):  # in the order of the ranks, whoever adds
            if sender == transport.rank:
                coded += own
                raw += buffers.raw[sender]
            else:
                found, plain = self._open(buffers, encoder, data, sender)
                coded += found
                raw += plain
        for slot in layout.coded:
            if slot.name not in agreed.silent:
                slot.read(error, self.state[self._parameters[slot.name]]["e"])
        for slot in layout.raw:
            self.state[self._parameters[slot.name]]["e"].zero_()
        return coded / transport.world, raw / transport.world

    def _publish(self, buffers: GroupBuffers) -> None:
        """Send the served part of the weights, quantized, and go to the weights that all ranks have sent."""
        transport, encoder = self.comm.transport, self._encoder(self.weight)
        for slot, rows in self._rows(buffers):
            slot.view(rows)[transport.rank] = self.state[self._parameters[slot.name]]["x"]
        frame, values = self._frame(encoder, buffers, buffers.coded[transport.rank], transport.rank, None)
        message = pack(self._message(buffers, frame, torch.cat([values, buffers.raw[transport.rank]])))
        for sender, data in enumerate(transport.all_gather(message, self._length([message]))):
            buffers.coded[sender], buffers.raw[sender] = self._open(buffers, encoder, data, sender)
        self._read(buffers)

    def _read(self, buffers: GroupBuffers) -> None:
        for slot, rows in self._rows(buffers):
            slot.read(rows, self._parameters[slot.name].data)

    def _encoder(self, codec: Codec | None) -> Encoder | None:
        if codec is None:
            return None
        comm, transport = self.comm, self.comm.transport
        return Encoder(
            codec=codec,
            state=codec.init_state(),
            seed=comm.seed,
            step=comm.step,
            rank=transport.rank,
            world=transport.world,
            traffic=comm.traffic,
        )

    def _frame(
        self, encoder: Encoder | None, buffers: GroupBuffers, row: torch.Tensor, index: int, error: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the frame of a row and no values, or no frame and the values where nothing is encoded."""
        if encoder is None:
            return torch.empty(0, dtype=torch.uint8), row
        return encoder.encode(row, buffers.layout, index, error), row[:0]

    def _message(self, buffers: GroupBuffers, frame: torch.Tensor, raw: torch.Tensor) -> Message:
        return Message(
            sender=self.comm.transport.rank,
            step=self.comm.step,
            group=buffers.layout.index,
            flags=torch.empty(0, dtype=torch.uint8),
            frame=frame,
            raw=raw,
        )

    def _open(
        self, buffers: GroupBuffers, encoder: Encoder | None, data: torch.Tensor, sender: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layout, device = buffers.layout, buffers.coded.device
        plain = layout.coded_width if encoder is None else 0
        try:
            message = unpack(
                data,
                sender=sender,
                step=self.comm.step,
                group=layout.index,
                flags=0,
                raw=plain + layout.raw_width,
            )
            raw = message.raw.to(device)
            if encoder is None:
                return raw[:plain], raw[plain:]
            coded = torch.empty(layout.coded_width, device=device)
            encoder.decode_into(message.frame, layout, coded)
        except CorruptDataError as error:
            raise CorruptDataError(f"the message from rank {sender} arrived damaged ({error})") from error
        return coded, raw[plain:]

    def _length(self, messages: list[torch.Tensor | None]) -> int | None:
        if any(codec is not None and hasattr(codec, "codec") for codec in (self.update, self.weight)):
            return None
        return next((len(message) for message in messages if message is not None), 0)


def _check_group(group: Mapping[str, Any]) -> None:
    check_number(group["lr"], "lr", 0.0)
    check_number(group["beta"], "beta", 0.0, 1.0, open_high=True)
    check_number(group["theta"], "theta", 0.0, 1.0)
    check_number(group["eps"], "eps", 0.0, open_low=True)
    check_number(group["weight_decay"], "weight_decay", 0.0)
