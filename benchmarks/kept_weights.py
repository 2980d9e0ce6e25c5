"""Evaluation of a quantized model with and without the codes of its weights being kept.

    OMP_NUM_THREADS=1 python benchmarks/kept_weights.py [--repeats N] [--clock cpu|wall]
"""

from __future__ import annotations

import argparse
import copy
import statistics

import torch

import gradbits as gb
import gradbits.nn.kept_weights as kept
from gradbits.bench.allocator import keep_freed_memory
from gradbits.bench.record import head_lines, surroundings
from gradbits.bench.table import aligned
from gradbits.bench.timing import CLOCKS, interleaved
from gradbits.train.models import build_model

IMAGE = {"in_channels": 3, "classes": 10}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--clock", choices=list(CLOCKS), default="cpu")
    o = parser.parse_args()
    allocator = keep_freed_memory()
    command = f"python benchmarks/kept_weights.py --repeats {o.repeats} --clock {o.clock}"
    print("\n".join(head_lines(surroundings(command, clock=o.clock, repeats=o.repeats, allocator=allocator))))
    rows = [("resnet18, evaluation", "quantized each time", "kept", "ratio")]
    torch.manual_seed(0)
    model = build_model("resnet18", IMAGE).eval()
    gb.quantize_(model, gb.recipe("int8_dynamic"))
    fresh = copy.deepcopy(model)
    for parameter in fresh.parameters():
        parameter.__dict__[kept._NOTE] = kept.KeptWeight(trusted=False)
    for batch in (1, 8, 64):
        x = torch.randn(batch, 3, 32, 32)

        def run_of(net: torch.nn.Module, x: torch.Tensor = x):
            def run() -> None:
                with torch.no_grad():
                    net(x)

            return run

        runs = {"fresh": run_of(fresh), "kept": run_of(model)}
        for warm_up in (*runs.values(), *runs.values()):
            warm_up()
        times = interleaved(runs, repeats=o.repeats, clock=o.clock)
        a, b = (statistics.median(times[name]) for name in ("fresh", "kept"))
        rows.append((f"batch {batch}", f"{a:.2f} ms", f"{b:.2f} ms", f"{a / b:.2f}"))
    print(aligned(rows))


if __name__ == "__main__":
    main()
