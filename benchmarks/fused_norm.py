"""Batch norm + shortcut + ReLU, forward and backward: PyTorch's operations against the fused pass.

    OMP_NUM_THREADS=1 python benchmarks/fused_norm.py [--repeats N] [--clock cpu|wall] [--batch N]

prints the table of docs/memory.md.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import nn

import gradbits.nn.norm
from gradbits.bench.allocator import keep_freed_memory
from gradbits.bench.record import head_lines, surroundings
from gradbits.bench.table import aligned
from gradbits.bench.timing import CLOCKS, interleaved
from gradbits.nn import norm_relu

SHAPES = ((16, 32), (32, 16), (64, 8), (64, 32), (128, 16), (256, 8), (512, 4))  # channels, image side


def run_of(norm: nn.Module, x: torch.Tensor, residual: torch.Tensor | None, g: torch.Tensor):
    """Return a forward and backward pass."""
    inputs = [t for t in (x, residual, *norm.parameters()) if t is not None]

    def run() -> None:
        torch.autograd.grad(norm_relu(norm, x, residual), inputs, g)

    return run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--clock", choices=list(CLOCKS), default="cpu")
    parser.add_argument("--batch", type=int, default=128)
    o = parser.parse_args()
    gradbits.nn.norm.LEAST = 0  # measure also where it does not pay
    allocator = keep_freed_memory()
    command = f"python benchmarks/fused_norm.py --repeats {o.repeats} --clock {o.clock} --batch {o.batch}"
    print("\n".join(head_lines(surroundings(command, clock=o.clock, repeats=o.repeats, allocator=allocator))))
    lines = [("channels, image, dtype", "shortcut", "one by one", "fused", "one by one / fused")]
    for channels, side in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for has_residual in (False, True):
                torch.manual_seed(0)
                x, r, g = (
                    torch.randn(o.batch, channels, side, side).to(dtype).to(memory_format=torch.channels_last)
                    for _ in range(3)
                )
                residual = r.requires_grad_() if has_residual else None
                plain, fused = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
                gradbits.fuse_(fused)
                runs = {n: run_of(m, x.requires_grad_(), residual, g) for n, m in (("p", plain), ("f", fused))}
                for run in runs.values():
                    run()
                p, f = (statistics.median(t) for t in interleaved(runs, o.repeats, o.clock).values())
                label = f"{channels}, {side} x {side}, {str(dtype).removeprefix('torch.')}"
                lines.append((label, "yes" if has_residual else "no", f"{p:.2f} ms", f"{f:.2f} ms", f"{p / f:.2f}"))
    print(aligned(lines))


if __name__ == "__main__":
    main()
