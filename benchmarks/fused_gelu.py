"""GELU, forward and backward: PyTorch's operations against one native pass each.

    python benchmarks/fused_gelu.py [--repeats N] [--clock cpu|wall]

prints the table of docs/memory.md.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import nn

import gradbits.nn.gelu
from gradbits.bench.allocator import keep_freed_memory
from gradbits.bench.record import head_lines, surroundings
from gradbits.bench.table import aligned
from gradbits.bench.timing import CLOCKS, interleaved


def run_of(gelu: nn.Module, x: torch.Tensor, g: torch.Tensor) -> Callable[[], None]:
    """Return a forward and backward pass."""

    def run() -> None:
        torch.autograd.grad(gelu(x), x, g)

    return run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    o = parser.parse_args()
    gradbits.nn.gelu.LEAST = 0  # measure also where it does not pay
    allocator = keep_freed_memory()
    command = f"python benchmarks/fused_gelu.py --repeats {o.repeats} --clock {o.clock}"
    print("\n".join(head_lines(surroundings(command, clock=o.clock, repeats=o.repeats, allocator=allocator))))
    lines = [("elements, dtype, approximate", "torch", "one pass", "torch / one pass")]
    for exponent in (13, 15, 17, 20, 22):
        for dtype in (torch.float32, torch.bfloat16):
            for approximate in ("none", "tanh"):
                torch.manual_seed(0)
                x, g = (torch.randn(1 << exponent).to(dtype) for _ in range(2))
                plain, fused = nn.GELU(approximate), nn.GELU(approximate)
                gradbits.fuse_(fused)
                runs = {n: run_of(m, x.requires_grad_(), g) for n, m in (("p", plain), ("f", fused))}
                for run in runs.values():
                    run()
                p, f = (statistics.median(t) for t in interleaved(runs, o.repeats, o.clock).values())
                label = f"2^{exponent}, {str(dtype).removeprefix('torch.')}, {approximate}"
                lines.append((label, f"{p:.3f} ms", f"{f:.3f} ms", f"{p / f:.2f}"))
    print(aligned(lines))


if __name__ == "__main__":
    main()
