"""The state of compressed communication: codec, step, residuals by parameter name, and what was sent."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from gradbits.core.checks import check_choice, check_instance, check_integer, check_module, check_number
from gradbits.core.errors import ArgumentError, NonFiniteError, WireError
from gradbits.core.noise import draw_seed
from gradbits.wire.buffers import GroupBuffers
from gradbits.wire.codec import Codec
from gradbits.wire.ddp import BucketFlow
from gradbits.wire.encoder import Encoder
from gradbits.wire.exchange import Outcome
from gradbits.wire.feedback import ErrorFeedback
from gradbits.wire.layout import GroupLayout, make_groups
from gradbits.wire.registry import codec as find_codec
from gradbits.wire.resume import restore, snapshot
from gradbits.wire.transport import Traffic, Transport, private_group

NONFINITE = ("propagate", "raise")
_FINE, _NOT_FINITE, _DAMAGED = 0, 1, 2  # what a rank says at the end of a step


class CommState:
    """What ``gradbits.wire.hook`` needs to know and remembers; ``gradbits.compress_`` makes one and registers both.

    Args:
        model: whose parameters are trained, not wrapped or wrapped by DDP; or the parameters by name.
        codec: a codec or its name; ``options`` are its options, with ``entropy`` and ``feedback`` as in
            ``gradbits.wire.codec``.
        start: steps at the beginning that go uncompressed.
        min_elements: smaller parameters go as they are, in the same messages; so do vectors (biases, norms) below
            64 times as many.
        group_mb: size of the groups of parameters that travel together, in MB of float32.
        scale: returns the factor that losses are multiplied with, as ``scaler.get_scale`` of a GradScaler; residuals
            follow when it changes.
        on_nonfinite: what a gradient with NaN or Inf does: ``"propagate"`` makes that of its parameter NaN on all
            ranks, so that every GradScaler sees it; ``"raise"`` raises on all ranks. No state moves either way.
        process_group: whose ranks average; None: the default group.

    Raises:
        ArgumentError, DtypeError: an option that is not legal, or a model without trainable parameters.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Parameter],
        codec: str | Codec = "qsgd",
        *,
        start: int = 0,
        min_elements: int = 1024,
        group_mb: float = 25.0,
        scale: Callable[[], float] | None = None,
        on_nonfinite: str = "propagate",
        process_group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        self.model = model if isinstance(model, Mapping) else check_module(model)
        self.codec = find_codec(codec, **options)
        self.start = check_integer(start, "start", 0)
        self.min_elements = check_integer(min_elements, "min_elements", 1)
        self.group_mb = check_number(group_mb, "group_mb", 0.0, open_low=True)
        self.on_nonfinite = check_choice(on_nonfinite, "on_nonfinite", NONFINITE)
        if scale is not None and not callable(scale):
            raise ArgumentError(f"scale={scale!r}: must be a function without arguments, as scaler.get_scale")
        self.scale = scale
        self.process_group = process_group
        self.feedback = isinstance(self.codec, ErrorFeedback)
        self.encoding: Codec = self.codec.codec if isinstance(self.codec, ErrorFeedback) else self.codec
        self.codec_state = self.encoding.init_state()
        self.step = 0
        self.seed = draw_seed()
        self.traffic = Traffic()
        self.residual_scale = 1.0  # of the losses that the residuals belong to
        self.groups: list[GroupBuffers] = []
        self._transport: Transport | None = None
        self.due = False
        self._statistics: torch.Tensor | None = None
        self._flow: BucketFlow | None = None
        self._waiting: Sequence[Mapping[str, Any]] | None = None
        if not self.parameters():
            raise ArgumentError("model: has no parameter that is trained")

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank has sent, headers and sizes included."""
        return self.traffic.sent

    @property
    def ratio(self) -> float:
        """How many times more a ring all-reduce in float32 would have sent; 1 before the first step."""
        return self.traffic.plain / self.traffic.sent if self.traffic.sent else 1.0

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds that went into ``encode``, ``network`` (waiting for slower ranks included) and ``decode``."""
        return dict(self.traffic.seconds)

    @property
    def compressing(self) -> bool:
        """Whether the present step is compressed."""
        return self.step >= self.start

    @property
    def transport(self) -> Transport:
        """The collectives; made at the first use, which all ranks must reach."""
        if self._transport is None:
            self.setup()
        assert self._transport is not None
        return self._transport

    @property
    def flow(self) -> BucketFlow:
        """What the hook hands buckets to."""
        if self._flow is None:
            self.setup()
            self._flow = BucketFlow(self)
        return self._flow

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name, in the order of the model."""
        module = self.model
        if isinstance(module, Mapping):
            return dict(module)
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module = module.module
        ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
        return {name: p for name, p in module.named_parameters() if p.requires_grad and name not in ignored}

    def setup(self, layouts: Sequence[GroupLayout] | None = None, device: torch.device | None = None) -> None:
        """Make the process group and the buffers; every rank must call it, the hook does so at its first step.

        Args:
            layouts: groups of parameters; None makes them.
            device: of the gradients; None: of the first parameter.
        """
        if self._transport is not None:
            return
        together = dist.is_available() and dist.is_initialized()
        self._transport = Transport(private_group(self.process_group) if together else None, self.traffic)
        parameters = self.parameters()
        if layouts is None:
            layouts = make_groups(
                ((name, p.shape) for name, p in parameters.items()),
                world=self._transport.world,
                min_elements=self.min_elements,
                group_elements=max(1, int(self.group_mb * 1e6 / 4)),
            )
        device = next(iter(parameters.values())).device if device is None else device
        self.groups = [GroupBuffers(layout, self.feedback, device) for layout in layouts]
        self._check_agreement()
        if self._waiting is not None:
            restore(self, self._waiting)
            self._waiting = None

    def _check_agreement(self) -> None:
        """Refuse ranks that would send each other what they cannot read: they would hang, or crash the program."""
        described = [self.codec.to_json(), self.start, [buffers.layout for buffers in self.groups]]
        digest = hashlib.sha256(repr(described).encode()).digest()[:8]
        sent = self.traffic.sent
        found = self.transport.gather_values(torch.frombuffer(bytearray(digest), dtype=torch.int64)).view(-1).tolist()
        self.traffic.sent = sent  # which counts what steps send
        if len(set(found)) > 1:
            other = next(rank for rank, value in enumerate(found) if value != found[0])
            raise ArgumentError(
                f"codec={self.codec!r}, start={self.start}: rank {other} was given another codec, other options or "
                "other parameters than rank 0; all ranks must have the same"
            )

    def encoder(self) -> Encoder:
        """Return the codec at the present step."""
        return Encoder(
            codec=self.encoding,
            state=self.codec_state,
            seed=self.seed,
            step=self.step,
            rank=self.transport.rank,
            world=self.transport.world,
            traffic=self.traffic,
            beta=self.codec.beta if isinstance(self.codec, ErrorFeedback) else 1.0,
            gamma=self.codec.gamma if isinstance(self.codec, ErrorFeedback) else 1.0,
        )

    def begin(self) -> None:
        """Begin a step: residuals follow the scale of the losses."""
        scale = 1.0 if self.scale is None else float(self.scale())
        if scale != self.residual_scale and scale > 0:
            for buffers in self.groups:
                buffers.rescale(scale / self.residual_scale)
            self.residual_scale = scale

    def is_due(self) -> bool:
        """Return whether the levels of an adaptive codec are adapted at the end of this step."""
        return self.due or self.encoding.is_due(self.step)

    def observe(self, buffers: GroupBuffers) -> None:
        """Let an adaptive codec see a group's gradients of this rank, where its levels are due."""
        self.due = self.is_due()
        if not self.due or not buffers.layout.coded or not bool(torch.isfinite(buffers.coded).all()):
            return
        for row in buffers.coded:
            seen = self.encoding.statistics(row).cpu()
            self._statistics = seen if self._statistics is None else self._statistics + seen

    def finish(self, outcomes: Sequence[tuple[GroupBuffers, Outcome]]) -> None:
        """End a step: the ranks agree on whether it was whole and finite, and only then residuals and levels move.

        Raises:
            WireError: a message arrived damaged somewhere; all ranks raise it.
            NonFiniteError: with ``on_nonfinite="raise"``; all ranks raise it.
        """
        step, finite = self.step, all(outcome.finite for _, outcome in outcomes)
        agreed = self.transport.gather_values(self._status(outcomes)).tolist()
        self.step += 1
        for buffers, _ in outcomes:
            buffers.commit() if finite else buffers.rollback()
        self._raise_damage(step, agreed, outcomes)
        if finite and self.due:
            self._adapt()
        self._statistics = None
        if self.on_nonfinite == "raise" and not finite:
            raise NonFiniteError(f"step {step}: {self._blame(agreed)}")

    def check_damage(self, outcomes: Sequence[tuple[GroupBuffers, Outcome]]) -> None:
        """Raise ``WireError`` where an outcome, agreed by all ranks, says that a message arrived damaged."""
        self._raise_damage(self.step, [self._status(outcomes).tolist()], outcomes)

    def finish_plain(self) -> None:
        """End an uncompressed step."""
        if self.due:
            self._adapt()
        self._statistics = None
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state as plain tensors and JSON values; every rank has its own."""
        self.setup()
        return snapshot(self)

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Take a state that ``state_dict`` returned.

        With this rank's own state, training goes on bit for bit. With the states of all ranks, in a list, it also goes
        on with another number of ranks: each takes the mean of the old ranks' residuals, so that the mean of all, which
        is what will still reach the parameters, stays as it was.

        Raises:
            ArgumentError: a state of another codec or other parameters, or of another number of ranks or another rank
                where a single one is given.
            CorruptDataError: something that is no state.
        """
        check_instance(state, "state", Mapping, Sequence)
        states = [state] if isinstance(state, Mapping) else list(state)
        if self._transport is None:
            self._waiting = states
        else:
            restore(self, states)

    def _raise_damage(
        self, step: int, agreed: list[list[int]], outcomes: Sequence[tuple[GroupBuffers, Outcome]]
    ) -> None:
        if damaged := next((line for line in agreed if line[0] == _DAMAGED), None):
            _, group, sender, receiver = damaged
            reason = "".join(
                f" ({outcome.damage.reason})" for _, outcome in outcomes if outcome.damage and outcome.damage.reason
            )
            raise WireError(
                f"step {step}, {self.groups[group].layout.title}: the message from rank {sender} arrived damaged at "
                f"rank {receiver}{reason}; the ranks cannot go on from here"
            )

    def _status(self, outcomes: Sequence[tuple[GroupBuffers, Outcome]]) -> torch.Tensor:
        for buffers, outcome in outcomes:
            if outcome.damage is not None:
                found = outcome.damage
                return torch.tensor([_DAMAGED, buffers.layout.index, found.sender, found.receiver])
        for buffers, outcome in outcomes:
            if outcome.offender is not None:
                return torch.tensor([_NOT_FINITE, buffers.layout.index, outcome.offender, 0])
        return torch.tensor([_FINE, 0, 0, 0])

    def _blame(self, agreed: list[list[int]]) -> str:
        for rank, (kind, group, index, _) in enumerate(agreed):
            if kind == _NOT_FINITE:
                layout = self.groups[group].layout
                return f"the gradient of {(*layout.coded, *layout.raw)[index].name!r} on rank {rank} holds NaN or Inf"
        return "the sum of the ranks' gradients is beyond float32"

    def _adapt(self) -> None:
        """Give every rank the levels that fit all ranks' gradients; sums in one order give the same bits."""
        own = self._statistics
        if own is None:
            own = torch.zeros_like(self.encoding.statistics(torch.zeros(1)))
        total = torch.zeros_like(own)
        for line in self.transport.gather_values(own):
            total += line
        if bool(torch.isfinite(total).all()):
            self.codec_state = self.encoding.adapt(self.codec_state, total)
            self.due = not bool(total.any())  # where nothing was seen, the next step is waited for
