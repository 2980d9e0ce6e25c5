"""How well a network does on its test set."""

from __future__ import annotations

import math

import torch
from torch import nn

from gradbits.core.errors import GradbitsError
from gradbits.train.interrupt import StopRequest
from gradbits.train.network import Network
from gradbits.train.tasks import Task

LARGEST = 1e9  # of a parameter; no network that is of any use comes near it


@torch.no_grad()
def evaluate(network: Network, task: Task, seed: int, stop: StopRequest | None = None) -> float:
    """Return the test metric: the share of right answers, or bits per byte; NaN where a diverged network refuses.

    The random generators are left as they were, so that testing more or less often changes nothing in the training.

    Args:
        network: put into evaluation mode meanwhile.
        task: has the test set.
        seed: for whatever rounds stochastically while testing.
        stop: looked at after each batch.

    Raises:
        Interrupted: a stop was requested.
        GradbitsError: the network refuses the data and has not diverged.
    """
    cuda = [network.device] if network.device.type == "cuda" else []
    right, count, nats = 0, 0, 0.0
    was_training = network.model.training
    network.model.eval()
    try:
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(seed)
            for batch in task.test_batches():
                if stop is not None:
                    stop.check()
                batch = batch.to(network.device)
                loss, logits = network.forward(batch)
                right += int((logits.argmax(1) == batch.targets).sum())
                nats += loss.item() * len(batch.targets)
                count += len(batch.targets)
    except GradbitsError:
        # a network that no longer has a value has diverged, which is a result and must not end the whole run
        if not has_diverged(network.model):
            raise
        return math.nan
    finally:
        network.model.train(was_training)
    return right / count if task.metric == "test_accuracy" else nats / count / math.log(2)


def has_diverged(model: nn.Module) -> bool:
    """Return whether a parameter or a statistic is not finite, or so large that products of a few overflow float32.

    >>> net = nn.Linear(2, 1)
    >>> _ = nn.init.constant_(net.bias, math.nan)
    >>> has_diverged(net), has_diverged(nn.Linear(2, 1))
    (True, False)
    """
    tensors = (*model.parameters(), *model.buffers())
    return not all(bool((t.abs() < LARGEST).all()) for t in tensors if t.is_floating_point())
