"""One network in training: model, optimizer, schedule and companions, built from the options and a seed."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gradbits.core.errors import CorruptDataError
from gradbits.nn import pack_activations
from gradbits.optim.delta_schedule import DeltaSchedule
from gradbits.optim.hessian import scaled_layers
from gradbits.recipes.learning import HessianScaling
from gradbits.train.companion import Companion
from gradbits.train.compressing import compression_companions
from gradbits.train.entry import Entry
from gradbits.train.link import Link
from gradbits.train.model_file import load_initial
from gradbits.train.models import build_model
from gradbits.train.options import OWN_WIRE, TrainOptions
from gradbits.train.penalty import GradientPenalty, make_penalty
from gradbits.train.ranks import Ranks
from gradbits.train.tasks import Batch, Task

WARMUP = 0.05  # share of the steps over which a cosine schedule rises


@dataclass(kw_only=True)
class Network:
    """A model with everything that moves it.

    Args:
        entry: what it is.
        model, optimizer, scheduler: as in any PyTorch program.
        companions: act after each step, in this order.
        device: where the batches go.
        pack_bits: bits of what autograd keeps; None packs nothing.
        penalty: a term of the loss of a training step, or None.
        ranks: the processes that train it together.
        link: keeps their replicas together; None on one process.
    """

    entry: Entry
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    device: torch.device
    companions: list[Companion] = field(default_factory=list)
    pack_bits: int | None = None
    penalty: GradientPenalty | None = None
    ranks: Ranks = field(default_factory=Ranks)
    link: Link | None = None

    def connect(self, options: TrainOptions) -> None:
        """Let the replicas of all ranks train together from here on; every rank must call it."""
        if self.ranks.world > 1:
            self.link = Link(self.ranks, self.model, self.optimizer, options)

    def packing(self) -> pack_activations | contextlib.nullcontext[None]:
        """Return the context in which the forward pass of a training step runs."""
        return contextlib.nullcontext() if self.pack_bits is None else pack_activations(bits=self.pack_bits)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of the forward pass: bfloat16 for ``bf16``, nothing otherwise."""
        if self.entry.recipe == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def forward(self, batch: Batch, module: nn.Module | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean cross-entropy in nats and the logits [N, classes] of a batch.

        Args:
            batch: on the network's device.
            module: the model with what is wrapped around it; None: the model alone.
        """
        with self.autocast():
            logits = (self.model if module is None else module)(batch.inputs).flatten(0, -2)
            return F.cross_entropy(logits.float(), batch.targets), logits

    def step(self, batch: Batch, step: int) -> tuple[float, int]:
        """Make one training step.

        Args:
            batch: on the network's device.
            step: its number, from 1.

        Returns:
            The mean loss in nats, without a penalty, and the number of right answers.
        """
        self.optimizer.zero_grad(set_to_none=True)
        module = None
        if self.link is not None:
            self.link.before_forward()
            module = self.link.module
        if self.penalty is not None and self.penalty.is_on(step):
            with self.penalty.recording(self.model, step) as recorded:
                loss, logits = self.forward(batch, module)
            (loss + self.penalty.term(loss, self.model, recorded, step)).backward()
        else:
            with self.packing():
                loss, logits = self.forward(batch, module)
            loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        for companion in self.companions:
            companion.after_step(step)
        return loss.item(), int((logits.argmax(1) == batch.targets).sum())

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, the random generators' states included.

        With several ranks, every rank must call it; on rank 0 it holds what the ranks have of their own, too.
        """
        state: dict[str, Any] = {
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "companions": [companion.state_dict() for companion in self.companions],
            "rng": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        if self.link is not None:
            own = {"rng": state["rng"], "wire": self.link.state_dict(), "companions": state["companions"]}
            if hasattr(self.optimizer, "comm"):
                own["optimizer"] = state["optimizer"]
            state["ranks"] = self.ranks.gather(own)
        return state

    def load_state_dict(self, state: dict[str, Any], source: str = "state") -> None:
        """Take a state that ``state_dict`` returned.

        Args:
            state: of a network built from the same options.
            source: the file it came from, for the message.

        Raises:
            CorruptDataError: it belongs to another network.
        """
        try:
            parts = state.get("ranks", [])
            mine = parts[self.ranks.rank] if len(parts) == self.ranks.world else {}
            self.model.load_state_dict(state["model"])
            if hasattr(self.optimizer, "comm") and parts:
                self.optimizer.load_ranks([part["optimizer"] for part in parts])  # type: ignore[attr-defined]
            else:
                self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            for companion, stored in zip(self.companions, mine.get("companions", state["companions"]), strict=True):
                companion.load_state_dict(stored)
            torch.set_rng_state(mine.get("rng", state["rng"]))
            if self.ranks.rank and not mine:  # another number of ranks than before: noise of its own, as at the start
                torch.manual_seed(self.ranks.seed(torch.initial_seed()))
            if self.link is not None:
                self.link.load_state_dict([part["wire"] for part in parts])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CorruptDataError(f"{source}: does not fit network {self.entry.label!r}: {reason}") from error


def build_network(
    entry: Entry, options: TrainOptions, task: Task, seed: int, total_steps: int, ranks: Ranks | None = None
) -> Network:
    """Return a network at step 0; the seed alone decides the initial weights, whatever the entry.

    Args:
        entry: which network.
        options: resolved.
        task: says what the model must take and return.
        seed: for the initial weights, and afterwards for the noise of the quantizers.
        total_steps: length of the schedule.
        ranks: the processes that train it together; None: this one alone.

    Raises:
        ArgumentError: a model, recipe or override that is not legal.
    """
    device = torch.device(options.device or "cpu")
    torch.manual_seed(seed)
    model = build_model(options.model or "", task.model_arguments(), options.model_options()).to(device)
    ranks = ranks or Ranks()
    # so that models that draw more or fewer initial weights train with the same noise, each rank with its own
    torch.manual_seed(ranks.seed(seed))
    if options.init is not None:
        load_initial(model, Path(options.init))
    if not entry.is_float:
        import gradbits
        from gradbits.recipes.registry import configured

        recipe = configured(entry.recipe, dict(entry.overrides))
        gradbits.quantize_(model, recipe, compute=options.compute or "auto")
    optimizer = _optimizer(model, options, ranks)
    companions: list[Companion] = []
    if not entry.is_float:
        from gradbits.optim import attach_companion_

        if isinstance(handle := attach_companion_(optimizer, model), Companion):
            companions.append(handle)
    companions += compression_companions(
        model, optimizer, prune=options.prune, share=options.share, total_steps=total_steps
    )
    cosine = options.schedule == "cosine"
    schedule = partial(_cosine, total=total_steps) if cosine else _constant
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    network = Network(
        entry=entry,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        device=device,
        companions=companions,
        pack_bits=options.pack_activations,
        penalty=make_penalty(options, task.steps_per_epoch, total_steps),
        ranks=ranks,
    )
    if layers := scaled_layers(model):
        losses = partial(_losses, network, layers[0].assignment.recipe.hessian, task, seed)
        measured = DeltaSchedule(model, losses, steps_per_epoch=task.steps_per_epoch, total=total_steps, seed=seed)
        network.companions.append(measured)
    return network


def _losses(
    network: Network, rule: HessianScaling | None, task: Task, seed: int, step: int
) -> Iterator[Callable[[], torch.Tensor]]:
    """Yield functions that return the loss of the training batches to come, each of its first samples."""
    samples = 0 if rule is None else rule.samples
    for index in itertools.count(step):
        batch = task.batch(seed, index)
        if samples and samples < len(batch.inputs):
            targets = len(batch.targets) // len(batch.inputs) * samples  # a text has many for each sample
            batch = Batch(batch.inputs[:samples], batch.targets[:targets])
        yield partial(_loss, network, batch.to(network.device))


def _loss(network: Network, batch: Batch) -> torch.Tensor:
    return network.forward(batch)[0]


def _optimizer(model: nn.Module, options: TrainOptions, ranks: Ranks) -> torch.optim.Optimizer:
    if options.optimizer in OWN_WIRE:
        from gradbits.optim import OneBitAdam, QuantizedAdam

        own = QuantizedAdam if options.optimizer == "quantized_adam" else OneBitAdam
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return own(named, lr=options.lr or 0.0, weight_decay=options.weight_decay or 0.0)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    lr, decay = options.lr or 0.0, options.weight_decay or 0.0
    if options.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=decay)
    kind = torch.optim.Adam if options.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=lr, weight_decay=decay)


def _constant(step: int) -> float:
    return 1.0


def _cosine(step: int, total: int) -> float:
    """The share of the learning rate at ``step``: a linear rise to 1, then half a cosine to 0 at ``total``."""
    warmup = math.ceil(WARMUP * total)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
