"""Data-parallel training on two gloo processes: replicas stay equal, gradients are the mean of the ranks' own."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = '''
import copy, os, sys
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
import gradbits as gb

RECIPES = {
    "int8_dynamic": {}, "unified_int8": {"activation_range": "ema", "refresh": 2}, "statquant_psq": {},
    "adaptive_int8": {}, "int4_transformer": {}, "ewgs": {}, "lsq": {},
}


def net():
    torch.manual_seed(0)  # the same start on both ranks
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3)
    )


def work(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    for name, options in RECIPES.items():
        model = net()
        recipe = gb.recipe(name, **options).with_overrides({"keep_float": ()})
        gb.quantize_(model, recipe)
        ddp = DDP(model)
        opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        gb.optim.attach_companion_(opt, model)
        torch.manual_seed(100 + rank)  # other data and other noise on each
        start = [p.detach().clone() for p in model.parameters()]
        for step in range(4):
            x = torch.randn(3, 2, 6, 6)
            single = copy.deepcopy(model)
            state = torch.get_rng_state()
            opt.zero_grad()
            ddp(x).square().mean().backward()
            after = torch.get_rng_state()
            if step == 0:
                torch.set_rng_state(state)
                single.zero_grad()
                single(x).square().mean().backward()
                torch.set_rng_state(after)
                for p, q in zip(model.parameters(), single.parameters()):
                    if p.grad is None:
                        continue
                    own = q.grad.clone()
                    dist.all_reduce(own)
                    assert torch.allclose(p.grad, own / 2, rtol=1e-5, atol=1e-7), name
            opt.step()
        if name == "ewgs":
            found = gb.optim.measure_deltas_(model, [lambda: model(x).square().mean()])
            own = torch.tensor(list(found.values()))
            both = [torch.empty_like(own), torch.empty_like(own)]
            dist.all_gather(both, own)
            assert torch.equal(*both), "replicas scale gradients differently"
        assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), start)), name
        for p in model.parameters():
            assert torch.isfinite(p).all(), name
            both = [torch.empty_like(p), torch.empty_like(p)]
            dist.all_gather(both, p.detach())
            assert torch.equal(*both), f"{name}: replicas differ"
    own = nn.Sequential(*(nn.Linear(4, 4) for _ in range(1 + rank)))  # stages of a pipeline: other layers on each rank
    gb.quantize_(own, gb.recipe("unified_int8", keep_float=()))
    opt = torch.optim.SGD(own.parameters(), lr=0.05)
    gb.optim.attach_companion_(opt, own, average=False)
    for _ in range(1 + rank):  # averaging would wait here for a rank that takes fewer steps
        own(torch.randn(5, 4)).square().sum().backward()
        opt.step()
    dist.barrier()
    open(f"{path}.{rank}", "w").close()
    os._exit(0)  # the ordinary end of a gloo group can wait for its own thread forever


if __name__ == "__main__":
    mp.spawn(work, args=(sys.argv[1],), nprocs=2)
'''


def test_replicas_stay_equal(tmp_path):
    script = tmp_path / "two_ranks.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "rendezvous")],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {p.suffix for p in tmp_path.glob("rendezvous.*")} == {".0", ".1"}  # both reached the end
