"""The test result of a trained network after post-training quantization."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from gradbits.core.errors import GradbitsError
from gradbits.nn import dequantize_
from gradbits.nn.quantized import Quantized
from gradbits.observe import evaluate_bits
from gradbits.train.evaluate import evaluate, has_diverged
from gradbits.train.interrupt import StopRequest
from gradbits.train.network import Network
from gradbits.train.tasks import Task

CALIBRATION = 4  # training batches


def evaluate_network_bits(
    network: Network, task: Task, bits: Sequence[int] | None, seed: int, stop: StopRequest | None = None
) -> dict[int, float] | None:
    """Return the test metric by number of bits; None where none are asked for, or the weights mean nothing in float.

    A network trained by a recipe is quantized from its float weights, unless its quantizers have learned something:
    then the weights belong to those. A diverged network that cannot be quantized gives NaN.

    Args:
        network: trained.
        task: gives test set and training batches, by which activation ranges are calibrated.
        bits: of weights and activations.
        seed: of the training batches.
        stop: looked at after each test batch.

    Raises:
        Interrupted: a stop was requested.
        GradbitsError: the network cannot be quantized and has not diverged.
    """
    if not bits or any(m.learned() for m in network.model.modules() if isinstance(m, Quantized)):
        return None
    model = copy.deepcopy(network.model)
    dequantize_(model)
    batches = [task.batch(seed, index).to(network.device).inputs for index in range(CALIBRATION)]

    def test(quantized: nn.Module) -> float:
        return evaluate(replace(network, model=quantized), task, seed, stop)

    try:
        found = evaluate_bits(model, test, batches, bits=tuple(bits))
    except GradbitsError:
        if not has_diverged(model):
            raise
        return dict.fromkeys(bits, math.nan)
    return {width: found[width] for width in bits}
