"""1-bit Adam: after a warm-up the second moment is frozen and momentum travels as signs, with error feedback."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from gradbits.core.checks import check_integer, check_number
from gradbits.core.errors import ArgumentError, CorruptDataError, DtypeError, GradbitsError, WireError
from gradbits.optim.stored import as_stored, check_ranks, check_stored, check_wire
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
from gradbits.wire.exchange import average


class OneBitAdam(torch.optim.Optimizer):
    r"""Adam that averages gradients in float32 for ``freeze_step`` steps, and signs of momentum from then on.

    .. math:: m_i = \beta_1 m + (1 - \beta_1)\,g_i, \qquad m \leftarrow C\big(\tfrac1N\sum_i C(m_i + e_i) + \bar e\big),
              \qquad x \leftarrow x - \alpha\,\mathrm{clip}\big(m / (\sqrt{v} + \epsilon), \pm c\big)

    with v as it was after the warm-up, and errors e of the workers and of the owners of each part. C sends the signs
    and the mean magnitude of each parameter's part. There is no bias correction, and a coordinate whose gradient was
    exactly zero through the whole warm-up stays where it is: v says nothing of it, and signs cannot be zero.

    All coordinates of a part get m of one magnitude, those too whose frozen v is tiny, and v cannot follow gradients
    that grow: without a limit the first ends a training within a few steps, a short warm-up does it in the long run. So
    from the freeze on the quotient is held within :math:`\pm c`. The default is the largest that Adam can have with a
    live v: :math:`(1-\beta_1) / \sqrt{(1-\beta_2)(1-\beta_1^2/\beta_2)}`, 7.27 for the default betas. The paper has no
    such limit; DeepSpeed lets its users mask such coordinates by hand.

    It is the relative of ``QuantizedAdam`` that is known best: it compresses momentum, not the update, and freezes v.
    Do not wrap the model in DDP. Build it on every rank: all ranks go on with the parameters of rank 0 (buffers, such
    as those of batch norm, stay each rank's own). Parameters that do not require a gradient when it is made are left as
    they are; so is, in each step, one that has no gradient on any rank.

    Args:
        params: parameters, named parameters or groups of them.
        lr: :math:`\alpha`.
        betas: :math:`(\beta_1, \beta_2)`.
        eps: :math:`\epsilon`.
        weight_decay: decoupled.
        freeze_step: steps of the warm-up; 15 to 25 % of the training are usual. Since v begins at zero and there is no
            bias correction, a short one makes all later steps larger, by up to :math:`1/\sqrt{1-\beta_2^{T}}`.
        clip: :math:`c`, above 0; no coordinate moves further than ``clip * lr`` in a step after the warm-up.
            ``float("inf")`` is the method as it was published.
        min_elements: parameters with fewer travel in float32, vectors below 64 times as many, too.
        process_group: the workers; None: the default group, or this process alone where there is none.

    A step in which a gradient (or its square) is not finite on any worker changes nothing on any; ``skipped`` counts
    them. A GradScaler leaves that decision, and unscaling, to the optimizer; its scale is that of its own rank.

    Raises:
        ArgumentError, DtypeError: an option that is not legal; parameters that differ between ranks.

    References:
        Tang et al., 1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence Speed, ICML 2021,
        arXiv:2102.02888.

    >>> weight = torch.nn.Parameter(torch.ones(40, 40))
    >>> optimizer = OneBitAdam([weight], lr=0.1, freeze_step=1)
    >>> for _ in range(2):
    ...     optimizer.zero_grad()
    ...     weight.square().sum().backward()
    ...     optimizer.step()
    >>> bool((weight < 1).all())
    True
    """

    _step_supports_amp_scaling = True  # GradScaler calls step() on every rank, whatever its own gradients are

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        freeze_step: int = 100,
        clip: float = 7.27,
        min_elements: int = 1024,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._ready = False
        super().__init__(check_params(params), {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.freeze_step = check_integer(freeze_step, "freeze_step", 1)
        self.clip = clip if clip == float("inf") else check_number(clip, "clip", 0.0, open_low=True)
        self.skipped = 0
        self._parameters = named_parameters(self)
        self.comm = CommState(
            self._parameters, "sign", feedback=True, min_elements=min_elements, process_group=process_group
        )
        self.comm.setup()
        broadcast_parameters(self._parameters, self.comm.transport)
        for parameter in self._parameters.values():
            like = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
            self.state[parameter] = {"m": like, "v": like.clone()}
        self._ready = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; possible only while the optimizer is made."""
        if self._ready:
            raise ArgumentError("param_group: OneBitAdam takes all groups when it is made")
        add_group(super().add_param_group, param_group)
        _check_group(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one step on every worker; all ranks must call it together.

        Raises:
            UnsupportedError: a gradient is sparse; nothing has been sent.
            WireError: an exchange failed; names the step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_dense(self._parameters)
        frozen = self.comm.step >= self.freeze_step
        try:
            agreed = agree(self, self._parameters, self.comm.transport)
            if agreed is None or not (self._compressed(agreed) if frozen else self._warm_up(agreed)):
                self.skipped += 1
                return loss
        except GradbitsError:
            raise
        except RuntimeError as error:
            raise WireError(f"step {self.comm.step}: {' '.join(str(error).split())[:300]}") from error
        for p, group in self._moving(agreed):
            state = self.state[p]
            # signs cannot say zero: a coordinate without gradient in the warm-up would move by lr * |m| / eps
            quotient = torch.where(state["v"] > 0, state["m"] / (state["v"].sqrt() + group["eps"]), 0.0)
            if frozen:
                quotient.clamp_(-self.clip, self.clip)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_((group["lr"] * quotient).to(p.dtype))
        return loss

    def _moving(self, agreed: Agreed) -> list[tuple[torch.nn.Parameter, dict[str, Any]]]:
        """Return the parameters with a gradient on some rank, and the groups that they are in."""
        group_of = {p: group for group in self.param_groups for p in group["params"]}
        return [(p, group_of[p]) for name, p in self._parameters.items() if name not in agreed.silent]

    def _warm_up(self, agreed: Agreed) -> bool:
        comm = self.comm
        for p, group in self._moving(agreed):
            (beta1, beta2), state = group["betas"], self.state[p]
            found = take_gradient(p, agreed)
            gradient = torch.zeros_like(state["m"]) if found is None else found.clone()
            comm.transport.all_reduce(gradient)
            comm.traffic.plain += comm.transport.plain_bytes(gradient.numel())
            state["m"].mul_(beta1).add_(gradient, alpha=1 - beta1)
            state["v"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        comm.step += 1
        return True

    def _compressed(self, agreed: Agreed) -> bool:
        """Exchange momentum; return whether it is finite on all ranks, for only then it has moved."""
        comm = self.comm
        group_of = dict(self._moving(agreed))
        outcomes = []
        for buffers in comm.groups:
            layout = buffers.layout
            for slots, values in ((layout.coded, buffers.coded), (layout.raw, buffers.raw)):
                for slot in slots:
                    p = self._parameters[slot.name]
                    if p not in group_of:
                        slot.view(values).zero_()  # zero on all ranks: its errors wait, too
                        continue
                    beta1, gradient = group_of[p]["betas"][0], take_gradient(p, agreed)
                    momentum = beta1 * self.state[p]["m"]
                    slot.write(values, momentum if gradient is None else momentum + (1 - beta1) * gradient)
            comm.traffic.plain += comm.transport.plain_bytes(layout.numel)
            outcomes.append((buffers, average(buffers, comm.encoder(), comm.transport)))
        comm.finish(outcomes)  # raises where a message was damaged, before any momentum has moved
        if not all(outcome.finite for _, outcome in outcomes):
            return False
        for buffers in comm.groups:
            layout = buffers.layout
            for slots, values in ((layout.coded, buffers.coded), (layout.raw, buffers.raw)):
                for slot in slots:
                    p = self._parameters[slot.name]
                    if p in group_of:
                        slot.read(values, self.state[p]["m"])
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this worker: ``m`` and ``v``, and under ``"wire"`` its errors by parameter name."""
        return {**super().state_dict(), "wire": {**self.comm.state_dict(), "skipped": self.skipped}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this worker's state; see ``load_ranks`` for another number of workers, and for what it raises."""
        self._load([state_dict], "state_dict")

    def load_ranks(self, states: Sequence[dict[str, Any]]) -> None:
        """Take the states of all workers, perhaps of another number of them; see ``CommState.load_state_dict``.

        Raises:
            ArgumentError, DtypeError: not the states of all ranks, or of other parameters.
            CorruptDataError: a state of something else, or a damaged one. The optimizer is then as it was.
        """
        self._load(check_ranks(states), "states")

    def _load(self, states: list[Any], name: str) -> None:
        for state in states:
            check_wire(self, state, name)
            check_stored(self, self._parameters, state, _shapes, _check_group, name)
        transport = self.comm.transport
        own = copy.copy(states[transport.rank] if len(states) == transport.world else states[0])
        before = self.comm.state_dict()
        try:
            self.comm.load_state_dict([state["wire"] for state in states])
        except GradbitsError:
            raise  # it has changed nothing
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            self.comm.load_state_dict(before)
            raise CorruptDataError(f"{name}: wire is damaged: {' '.join(repr(error).split())[:200]}") from error
        self.skipped = own["wire"]["skipped"]
        super().load_state_dict({key: value for key, value in own.items() if key != "wire"})
        as_stored(self, own)


def _shapes(parameter: torch.nn.Parameter) -> dict[str, torch.Size]:
    return {"m": parameter.shape, "v": parameter.shape}


def _check_group(group: Mapping[str, Any]) -> None:
    check_number(group["lr"], "lr", 0.0)
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise DtypeError(f"betas={betas!r}: must be a pair of numbers in [0, 1)")
    for index, beta in enumerate(betas):
        check_number(beta, f"betas[{index}]", 0.0, 1.0, open_high=True)
    check_number(group["eps"], "eps", 0.0, open_low=True)
    check_number(group["weight_decay"], "weight_decay", 0.0)
