"""One host of thin_links.py: trains a wide network with every way of averaging in turn; rank 0 prints JSON."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradbits.wire import compress_
from gradbits.wire.baselines import count_

BATCH, INPUTS, CLASSES = 8, 1024, 10
WARM_UP = 4  # steps; PowerSGD begins to compress at its third, ALQ finds its levels at the first


WAYS: dict[str, Callable[[DistributedDataParallel], object]] = {
    "fp32 all-reduce": lambda ddp: None,
    "fp16 hook": lambda ddp: count_(ddp, "fp16"),
    "powersgd rank 1": lambda ddp: count_(ddp, "powersgd"),
    "qsgd 4 bit": lambda ddp: compress_(ddp, "qsgd", bits=4),
    "alq 3 bit": lambda ddp: compress_(ddp, "alq", bits=3),
    "alq 3 bit + huffman": lambda ddp: compress_(ddp, "alq", bits=3, entropy="huffman"),
    "terngrad": lambda ddp: compress_(ddp, "terngrad"),
    "onebit + error feedback": lambda ddp: compress_(ddp, "onebit", feedback=True),
}


@dataclass
class Contestant:
    """A network and its optimizer."""

    model: DistributedDataParallel
    optimizer: torch.optim.Optimizer

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Train on one batch."""
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()


def network(hidden: int) -> nn.Module:
    """Return a network with little to compute for its number of parameters."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(INPUTS, hidden // 2), nn.ReLU(), nn.Linear(hidden // 2, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES)
    )


def bytes_sent() -> int:
    """Return what the interface has sent so far, packet headers included."""
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


def agreed(value: float) -> float:
    """Return the largest value of all ranks."""
    found = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def run(rounds: int, hidden: int) -> dict[str, object]:
    """Return seconds and bytes of a step of every contestant, of the slowest and the busiest rank."""
    contestants = {}
    for name, prepare in WAYS.items():
        model = DistributedDataParallel(network(hidden))
        prepare(model)
        contestants[name] = Contestant(model, torch.optim.SGD(model.parameters(), lr=0.01))
    torch.manual_seed(1 + dist.get_rank())
    x, y = torch.randn(BATCH, INPUTS), torch.randint(0, CLASSES, (BATCH,))
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    sent: dict[str, float] = {}
    for contestant in contestants.values():
        for _ in range(WARM_UP):
            contestant.step(x, y)
    names = list(WAYS)
    for turn in range(rounds):
        for offset in range(len(names)):
            name = names[(turn + offset) % len(names)]
            dist.barrier()
            before, started = bytes_sent(), time.perf_counter()
            contestants[name].step(x, y)
            dist.barrier()
            seconds[name].append(agreed(time.perf_counter() - started))
            sent[name] = agreed(float(bytes_sent() - before))
    return {
        "parameters": sum(p.numel() for p in contestants[names[0]].model.parameters()),
        "batch": BATCH,
        "rounds": rounds,
        "seconds": seconds,
        "sent": sent,
    }


def main() -> None:
    """Join the others, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=4096)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = run(options.rounds, options.hidden)
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
