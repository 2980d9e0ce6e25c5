"""Runs a piece of code on several gloo processes of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

HEAD = """
import datetime, faulthandler, os, sys
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
import gradbits as gb


def net(norm=True):
    torch.manual_seed(0)  # the same start on all ranks
    first = [nn.Linear(20, 64), nn.BatchNorm1d(64)] if norm else [nn.Linear(20, 64)]  # a norm makes DDP send buffers
    return nn.Sequential(*first, nn.ReLU(), nn.Linear(64, 33), nn.ReLU(), nn.Linear(33, 5))


def batch(rank, step):
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(8, 20, generator=generator), torch.randint(5, (8,), generator=generator)


def loss_of(model, rank, step):
    inputs, targets = batch(rank, step)
    return nn.functional.cross_entropy(model(inputs), targets)


def train(ddp, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        loss_of(ddp, dist.get_rank(), step).backward()
        optimizer.step()


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def equal_everywhere(values):
    found = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(found, values)
    return all(torch.equal(found[0], each) for each in found)
"""

TAIL = """

def work(rank, world, path, timeout):
    faulthandler.dump_traceback_later(100, exit=True)  # a hang says where
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=timeout)
    )
    if main(rank, world) != "alone":
        dist.barrier()
    open(f"{path}.{rank}", "w").close()
    os._exit(0)  # the ordinary end of a gloo group can wait for its own thread forever


if __name__ == "__main__":
    path, world, timeout = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    context = mp.get_context("fork")  # imports once
    ranks = [context.Process(target=work, args=(rank, world, path, timeout)) for rank in range(world)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join()
"""


def run_ranks(tmp_path: Path, main: str, world: int = 2, timeout: float = 60, lost: tuple[int, ...] = ()) -> str:
    """Run ``main(rank, world)``, whose source is given, on ``world`` processes; return what they printed.

    All of them must reach its end, except those in ``lost``.
    """
    script = tmp_path / "ranks.py"
    script.write_text(HEAD + textwrap.dedent(main) + TAIL)
    rendezvous = tmp_path / f"rendezvous{len(list(tmp_path.glob('rendezvous*')))}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, str(script), str(rendezvous), str(world), str(timeout)],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        env=environment,
    )
    ends = {path.suffix for path in tmp_path.glob(f"{rendezvous.name}.*")}
    assert ends == {f".{rank}" for rank in range(world) if rank not in lost}, (done.stdout + done.stderr)[-4000:]
    return done.stdout
