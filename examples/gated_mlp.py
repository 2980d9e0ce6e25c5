"""Conditional computation: a gated MLP on digits, one hidden unit in ten active, trained through binary gates.

A small network looks at the image and decides for each hidden unit whether it takes part. The gates are 0 or 1, so the
gradient has to be estimated:

    python examples/gated_mlp.py --estimator straight-through
    python examples/gated_mlp.py --estimator reinforce --steps 2000

References:
    Bengio, Léonard, Courville, Estimating or Propagating Gradients Through Stochastic Neurons for Conditional
    Computation, 2013, arXiv:1308.3432.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import nn
from torch.nn import functional as F

import gradbits as gb
from gradbits.core.checks import check_choice, check_integer, check_number
from gradbits.core.errors import GradbitsError
from gradbits.nn.stochastic import firing_probability
from gradbits.quantizers.estimators import STE, ClippedSTE, HardSigmoidSTE, SigmoidSTE
from gradbits.train.datasets import load_data
from gradbits.train.tasks import ImageTask

ESTIMATORS: dict[str, STE] = {
    "straight-through": STE(),
    "sigmoid": SigmoidSTE(),
    "clipped": ClippedSTE(),
    "hard-sigmoid": HardSigmoidSTE(),
}
GATES = (*ESTIMATORS, "reinforce", "stochastic-times-smooth", "noisy-rectifier")
LEAST = 1e-6  # of a probability, and of its distance from 1: the cross-entropy stays finite


def make_gate(name: str, units: int) -> nn.Module:
    """Return the layer that turns pre-activations into gates."""
    if name == "reinforce":
        return gb.nn.ReinforceNeuron(units)
    if name == "stochastic-times-smooth":
        return gb.nn.StochasticTimesSmooth()
    if name == "noisy-rectifier":
        return gb.nn.NoisyRectifier("logistic")
    return gb.nn.BinaryNeuron("hard_sigmoid" if name in ("clipped", "hard-sigmoid") else "sigmoid", ESTIMATORS[name])


def openness(name: str, a: torch.Tensor) -> torch.Tensor:
    """Return the probability that a gate is not 0."""
    if name in ("clipped", "hard-sigmoid"):
        return firing_probability(a, "hard_sigmoid")
    p = torch.sigmoid(a)  # of logistic noise too
    return p.sqrt() if name == "stochastic-times-smooth" else p


def start(name: str, active: float) -> float:
    """Return the pre-activation at which a gate is open with probability ``active``."""
    if name in ("clipped", "hard-sigmoid"):
        return 2.0 * active - 1.0
    p = active**2 if name == "stochastic-times-smooth" else active
    return math.log(p / (1.0 - p))


class GatedMLP(nn.Module):
    """One hidden layer of rectifiers, each times a gate that a smaller network computes from the same input.

    Args:
        gate: the layer that makes gates.
        bias: of the gates' pre-activations at the start.
    """

    def __init__(self, gate: nn.Module, bias: float, *, inputs: int = 64, units: int = 256, classes: int = 10) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(inputs, units), nn.Linear(units, classes)
        self.gater = nn.Sequential(nn.Linear(inputs, units // 8), nn.Tanh(), nn.Linear(units // 8, units))
        nn.init.constant_(self.gater[2].bias, bias)
        self.gate = gate

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits, gates, and their pre-activations."""
        x = x.flatten(1)
        a = self.gater(x)
        gates = self.gate(a)
        return self.head(torch.relu(self.hidden(x)) * gates), gates, a


def train(
    estimator: str, *, steps: int = 1000, active: float = 0.1, seed: int = 0, lr: float = 3e-3
) -> tuple[float, float]:
    """Train and return the test accuracy and the part of gates that are open on the test set.

    Args:
        estimator: one of ``GATES``.
        steps: of a batch of 64.
        active: target of the mean probability of each gate.
        seed: of weights, batches and gates.
        lr: learning rate of Adam.

    Raises:
        ArgumentError, DtypeError: a number that is not legal.
    """
    check_choice(estimator, "estimator", GATES)
    check_integer(steps, "steps", 1)
    check_number(active, "active", LEAST, 1.0 - LEAST)
    check_integer(seed, "seed", 0)
    check_number(lr, "lr", 0.0, open_low=True)
    task = ImageTask(load_data("digits"), 64)
    torch.manual_seed(seed)
    net = GatedMLP(make_gate(estimator, 256), start(estimator, active))
    opt = torch.optim.Adam(net.parameters(), lr=lr)
    for step in range(steps):
        batch = task.batch(seed, step)
        logits, _, a = net(batch.inputs)
        losses = F.cross_entropy(logits, batch.targets, reduction="none")
        # each gate's mean probability of being open, over the batch, is held at the target
        mean = openness(estimator, a).mean(0).clamp(LEAST, 1.0 - LEAST)
        loss = losses.mean() + 0.2 * F.binary_cross_entropy(mean, torch.full_like(mean, active), reduction="sum")
        if isinstance(net.gate, gb.nn.ReinforceNeuron):
            loss = loss + net.gate.term(losses)
        opt.zero_grad()
        loss.backward()
        opt.step()
    return evaluate(net, task)


@torch.no_grad()
def evaluate(net: GatedMLP, task: ImageTask) -> tuple[float, float]:
    """Return accuracy and the part of open gates, with gates drawn as in training."""
    right = count = 0
    opened = []
    for batch in task.test_batches():
        logits, gates, _ = net(batch.inputs)
        right += int((logits.argmax(1) == batch.targets).sum())
        count += len(batch.targets)
        opened.append((gates > 0).float().mean())
    return right / count, float(torch.stack(opened).mean())


def main() -> None:
    """Train one network, or one for each estimator."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--estimator", choices=(*GATES, "all"), default="straight-through")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--active", type=float, default=0.1, help="target part of open gates")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in GATES if options.estimator == "all" else (options.estimator,):
        try:
            accuracy, opened = train(name, steps=options.steps, active=options.active, seed=options.seed)
        except GradbitsError as error:
            parser.error(str(error))
        print(f"{name:24} test accuracy {100 * accuracy:.2f} %, {100 * opened:.1f} % of the hidden units active")


if __name__ == "__main__":
    main()
