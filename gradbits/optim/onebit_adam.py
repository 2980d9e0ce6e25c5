"""1-bit Adam: after a warm-up the second moment is frozen and momentum travels as signs, with error feedback."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from gradbits.core.checks import check_integer, check_number
from gradbits.core.errors import ArgumentError, GradbitsError, WireError
from gradbits.optim.wired import as_stored, check_shapes, named_parameters
from gradbits.wire import CommState
from gradbits.wire.exchange import average


class OneBitAdam(torch.optim.Optimizer):
    r"""Adam that averages gradients in float32 for ``freeze_step`` steps, and signs of momentum from then on.

    .. math:: m_i = \beta_1 m + (1 - \beta_1)\,g_i, \qquad m \leftarrow C\big(\tfrac1N\sum_i C(m_i + e_i) + \bar e\big),
              \qquad x \leftarrow x - \alpha\,m / (\sqrt{v} + \epsilon)

    with v as it was after the warm-up, and errors e of the workers and of the owners of each part. C sends the signs
    and the mean magnitude of each parameter's part. There is no bias correction, and a coordinate whose gradient was
    exactly zero through the whole warm-up stays where it is: v says nothing of it, and signs cannot be zero.

    It is the relative of ``QuantizedAdam`` that is known best: it compresses momentum, not the update, and freezes v.
    Do not wrap the model in DDP.

    Args:
        params: parameters, named parameters or groups of them.
        lr: :math:`\alpha`.
        betas: :math:`(\beta_1, \beta_2)`.
        eps: :math:`\epsilon`.
        weight_decay: decoupled.
        freeze_step: steps of the warm-up; 15 to 25 % of the training are usual.
        min_elements: parameters with fewer travel in float32, vectors below 64 times as many, too.
        process_group: the workers; None: the default group, or this process alone where there is none.

    A step in which a gradient is not finite on any worker changes nothing on any; ``skipped`` counts them.

    Raises:
        ArgumentError, DtypeError: an option that is not legal.

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

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        freeze_step: int = 100,
        min_elements: int = 1024,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._ready = False
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.freeze_step = check_integer(freeze_step, "freeze_step", 1)
        self.skipped = 0
        self._parameters = named_parameters(self)
        self.comm = CommState(
            self._parameters, "sign", feedback=True, min_elements=min_elements, process_group=process_group
        )
        self.comm.setup()
        for parameter in self._parameters.values():
            like = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
            self.state[parameter] = {"m": like, "v": like.clone()}
        self._ready = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; possible only while the optimizer is made."""
        if self._ready:
            raise ArgumentError("param_group: OneBitAdam takes all groups when it is made")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_number(group["lr"], "lr", 0.0)
        for index, beta in enumerate(group["betas"]):
            check_number(beta, f"betas[{index}]", 0.0, 1.0, open_high=True)
        check_number(group["eps"], "eps", 0.0, open_low=True)
        check_number(group["weight_decay"], "weight_decay", 0.0)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one step on every worker; all ranks must call it together.

        Raises:
            WireError: an exchange failed; names the step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        finite = all(bool(torch.isfinite(p.grad).all()) for p, _ in groups)
        try:
            if not bool(self.comm.transport.gather_values(torch.tensor([finite])).all()):
                self.skipped += 1
                return loss
            self._warm_up() if self.comm.step < self.freeze_step else self._compressed()
        except GradbitsError:
            raise
        except RuntimeError as error:
            raise WireError(f"step {self.comm.step}: {' '.join(str(error).split())[:300]}") from error
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                # signs cannot say zero: a coordinate without gradient in the warm-up would move by lr * |m| / eps
                move = torch.where(state["v"] > 0, state["m"] / (state["v"].sqrt() + group["eps"]), 0.0)
                p.sub_((group["lr"] * move).to(p.dtype))
        return loss

    def _warm_up(self) -> None:
        comm = self.comm
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                gradient = torch.zeros_like(self.state[p]["m"]) if p.grad is None else p.grad.float().clone()
                comm.transport.all_reduce(gradient)
                comm.traffic.plain += comm.transport.plain_bytes(gradient.numel())
                self.state[p]["m"].mul_(beta1).add_(gradient, alpha=1 - beta1)
                self.state[p]["v"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        comm.step += 1

    def _compressed(self) -> None:
        comm = self.comm
        group_of = {p: group for group in self.param_groups for p in group["params"]}
        outcomes = []
        for buffers in comm.groups:
            layout = buffers.layout
            rows = [*((s, buffers.coded) for s in layout.coded), *((s, buffers.raw) for s in layout.raw)]
            for slot, values in rows:
                p = self._parameters[slot.name]
                beta1, momentum = group_of[p]["betas"][0], self.state[p]["m"]
                slot.write(values, beta1 * momentum + (0 if p.grad is None else (1 - beta1) * p.grad.float()))
            comm.traffic.plain += comm.transport.plain_bytes(layout.numel)
            outcomes.append((buffers, average(buffers, comm.encoder(), comm.transport)))
        comm.finish(outcomes)  # raises where a message was damaged, before any momentum has moved
        if not all(outcome.finite for _, outcome in outcomes):
            self.skipped += 1
            return
        for buffers in comm.groups:
            for slot in buffers.layout.coded:
                slot.read(buffers.coded, self.state[self._parameters[slot.name]]["m"])
            for slot in buffers.layout.raw:
                slot.read(buffers.raw, self.state[self._parameters[slot.name]]["m"])

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this worker: ``m`` and ``v``, and under ``"wire"`` its errors by parameter name."""
        return {**super().state_dict(), "wire": {**self.comm.state_dict(), "skipped": self.skipped}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this worker's state; see ``load_ranks`` for another number of workers."""
        self.load_ranks([state_dict])

    def load_ranks(self, states: Sequence[dict[str, Any]]) -> None:
        """Take the states of all workers, perhaps of another number of them; see ``CommState.load_state_dict``."""
        rank = self.comm.transport.rank
        own = copy.copy(states[rank] if len(states) == self.comm.transport.world else states[0])
        check_shapes(self, own, ("m", "v"))
        self.comm.load_state_dict([state["wire"] for state in states])
        self.skipped = own["wire"]["skipped"]
        super().load_state_dict({key: value for key, value in own.items() if key != "wire"})
        as_stored(self, own)
