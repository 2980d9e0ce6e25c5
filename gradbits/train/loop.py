"""The training loop: steps, tests, log lines and checkpoints of one network, from any step onwards."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gradbits.core.errors import CorruptDataError
from gradbits.train.checkpoint import load_checkpoint, save_checkpoint
from gradbits.train.evaluate import evaluate
from gradbits.train.interrupt import Interrupted, StopRequest
from gradbits.train.log import Log
from gradbits.train.network import Network
from gradbits.train.progress import Reporter
from gradbits.train.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long a network is trained and how often something is done besides.

    Args:
        seed: for the batches and for the noise.
        total: steps of the whole training.
        test_every, log_every, save_every: steps between tests, log lines and further checkpoints (None: only with
            the tests); a test also comes after the last step.
    """

    seed: int
    total: int
    test_every: int
    log_every: int
    save_every: int | None = None


@dataclass(kw_only=True)
class Position:
    """Where a training is: the numbers of the loop that are not the network's own."""

    step: int = 0
    tested: int = 0  # the step of the latest test
    metric: float = math.nan
    seconds: float = 0.0
    recent_loss: float = 0.0  # sums since the latest log line
    recent_right: int = 0
    recent_targets: int = 0
    recent_steps: int = 0
    recent_seconds: float = 0.0
    final_loss: float = 0.0  # sum over the last epoch's worth of steps
    final_steps: int = 0
    log_bytes: int = 0
    identity: dict[str, Any] = field(default_factory=dict)


def train(
    network: Network,
    task: Task,
    plan: Plan,
    *,
    checkpoint: Path,
    log: Log,
    reporter: Reporter,
    stop: StopRequest,
    identity: dict[str, Any],
    position: Position | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Position:
    """Train ``network`` from ``position`` to the end and return where it ended.

    Args:
        network: at the state that belongs to ``position``.
        task: gives the batches.
        plan: the length and the intervals.
        checkpoint: file that always holds the latest complete state.
        log: gets a line every ``log_every`` steps and at each test.
        reporter: shows progress.
        stop: looked at between steps.
        identity: what the checkpoint says of itself, compared by ``restore``.
        position: None for a start at step 0.
        metadata: what the checkpoint says of its model, see ``model_metadata``.

    Raises:
        Interrupted: a stop was requested; the state has been saved.
    """
    at = position or Position(log_bytes=log.size(), identity=identity)
    final_steps = min(plan.total, task.steps_per_epoch)
    network.model.train()

    def save() -> None:
        at.log_bytes = log.size()
        tree = {"position": asdict(at), "network": network.state_dict(), "metadata": dict(metadata or {})}
        if network.ranks.leads:
            save_checkpoint(checkpoint, tree)

    try:
        while at.step < plan.total or at.tested < at.step:
            if at.tested < at.step and (at.step % plan.test_every == 0 or at.step == plan.total):
                # replicas are equal up to the buffers, and those of rank 0 are the ones that are kept
                at.metric = network.ranks.first(lambda: evaluate(network, task, plan.seed, stop))
                at.tested = at.step
                log.write(step=at.step, epoch=at.step / task.steps_per_epoch, **{task.metric: at.metric})
                reporter.test(at, task.metric)
                save()
                continue
            stop.check()
            started = time.perf_counter()
            batch = task.batch(plan.seed, at.step).to(network.device)
            loss, right = network.ranks.agree(*network.step(batch, at.step + 1), stop)
            elapsed = time.perf_counter() - started
            at.step += 1
            at.seconds += elapsed
            at.recent_seconds += elapsed
            at.recent_loss += loss
            at.recent_right += right
            at.recent_targets += len(batch.targets) * network.ranks.world
            at.recent_steps += 1
            if at.step > plan.total - final_steps:
                at.final_loss += loss
                at.final_steps += 1
            reporter.step(at, loss)
            if at.step % plan.log_every == 0 or at.step == plan.total:
                _log_step(log, at, network, task)
            if plan.save_every is not None and at.step % plan.save_every == 0:
                save()
    except Interrupted:
        save()
        raise
    return at


def restore(network: Network, checkpoint: Path, identity: dict[str, Any]) -> Position:
    """Put ``network`` into the state of ``checkpoint`` and return the position that belongs to it.

    Raises:
        CorruptDataError: the file is damaged, or belongs to another training than ``identity`` says.
    """
    tree = network.ranks.first(lambda: load_checkpoint(checkpoint))
    position = read_position(tree, checkpoint, identity)
    network.load_state_dict(tree["network"], str(checkpoint))
    return position


def read_position(tree: Any, checkpoint: Path, identity: dict[str, Any]) -> Position:
    """Return the position of a loaded checkpoint.

    Raises:
        CorruptDataError: it belongs to another training than ``identity`` says.
    """
    try:
        position = Position(**tree["position"])
    except (KeyError, TypeError) as error:
        raise CorruptDataError(f"{checkpoint}: is not a checkpoint of a training run") from error
    for key, value in identity.items():
        if position.identity.get(key) != value:
            raise CorruptDataError(
                f"{checkpoint}: belongs to a run with {key}={position.identity.get(key)!r}, not {value!r}"
            )
    return position


def _log_step(log: Log, at: Position, network: Network, task: Task) -> None:
    sent = {} if network.link is None else {"sent_bytes": network.link.counts.bytes_sent}
    log.write(
        step=at.step,
        epoch=at.step / task.steps_per_epoch,
        loss=at.recent_loss / at.recent_steps,
        accuracy=at.recent_right / at.recent_targets,
        lr=network.scheduler.get_last_lr()[0],
        step_ms=1000 * at.recent_seconds / at.recent_steps,
        **sent,
    )
    at.recent_loss, at.recent_right, at.recent_targets, at.recent_steps, at.recent_seconds = 0.0, 0, 0, 0, 0.0
