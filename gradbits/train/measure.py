"""What a step costs: time, bytes saved for backward, bits of a gradient element."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gradbits.observe.bits import gradient_bits
from gradbits.observe.memory import saved_bytes
from gradbits.train.interrupt import StopRequest
from gradbits.train.network import Network
from gradbits.train.tasks import Batch, Task

WARMUP, LEAST, MOST = 2, 5, 15  # rounds
BUDGET = 8.0  # seconds; beyond it no further round after the least


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one training step of a network costs.

    Args:
        step_ms: median time of a step (forward, backward, optimizer) in milliseconds.
        saved_bytes: kept for backward, see ``gradbits.observe.saved_bytes``.
        gradient_bits: bits of a gradient element that the backward products consume, on average.
    """

    step_ms: float
    saved_bytes: int
    gradient_bits: float


def measure(
    networks: Sequence[Network], task: Task, seed: int, stop: StopRequest | None = None, *, together: bool = False
) -> list[Cost]:
    """Return the cost of a step of each network, in their order.

    The networks take turns on the same batches and every round begins with another one, so that a machine that
    gets slower or busier meanwhile is unfair to none. The networks go on training meanwhile: give copies.

    Args:
        networks: to compare.
        task: gives the batches.
        seed: of the batches.
        stop: looked at after each round.
        together: whether other ranks take the same steps, so that no clock may decide how many there are.

    Raises:
        Interrupted: a stop was requested.
    """
    batches = [task.batch(seed, index).to(networks[0].device) for index in range(3)]
    saved = [_saved(network, batches[0]) for network in networks]
    bits = [_gradient_bits(network, batches[0]) for network in networks]
    times: list[list[float]] = [[] for _ in networks]
    started = time.perf_counter()
    for turn in range(WARMUP + MOST):
        if stop is not None:
            stop.check()
        if turn >= WARMUP + LEAST and (together or time.perf_counter() - started > BUDGET):
            break
        for offset in range(len(networks)):
            index = (turn + offset) % len(networks)
            elapsed = _timed_step(networks[index], batches[turn % len(batches)], turn + 1)
            if turn >= WARMUP:
                times[index].append(elapsed)
    return [
        Cost(step_ms=1000 * statistics.median(each), saved_bytes=size, gradient_bits=width)
        for each, size, width in zip(times, saved, bits, strict=True)
    ]


def _timed_step(network: Network, batch: Batch, step: int) -> float:
    network.model.train()
    if network.penalty is not None:
        network.penalty = network.penalty.at_once()
    _wait(network.device)
    started = time.perf_counter()
    network.step(batch, step)
    _wait(network.device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _saved(network: Network, batch: Batch) -> int:
    network.model.train()
    with network.packing() as packed:
        if packed is not None:
            network.forward(batch)
            return packed.tally.after
    return saved_bytes(network.model, lambda: network.forward(batch)[0])


def _gradient_bits(network: Network, batch: Batch) -> float:
    network.model.train()
    return gradient_bits(network.model, lambda: network.forward(batch)[0])
