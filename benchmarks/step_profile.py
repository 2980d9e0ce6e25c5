"""What a quantized training step spends its time on: shares of the operations that are not integer products.

    OMP_NUM_THREADS=1 python benchmarks/step_profile.py [--batch N]
"""

from __future__ import annotations

import argparse

import torch
from torch.profiler import ProfilerActivity, profile

from gradbits.bench.allocator import keep_freed_memory
from gradbits.bench.peers import Variant
from gradbits.bench.record import head_lines, surroundings
from gradbits.bench.steps import SUBJECTS, _training_step
from gradbits.bench.table import aligned

KINDS = {
    "integer products and quantizing": ("QuantizedProduct", "_int_mm", "onednn"),
    "attention": ("scaled_dot_product",),
    "batch norm": ("batch_norm", "NormReLU"),
    "ReLU": ("relu", "Relu", "threshold", "clamp_min"),
    "layer norm": ("layer_norm", "LayerNorm"),
    "GELU": ("gelu", "Gelu"),
    "float products": ("addmm", "aten::mm", "convolution"),
    "softmax and loss": ("softmax", "nll"),
    "optimizer": ("Optimizer",),
}


def main() -> None:
    """Profile and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--divide", type=int, default=4, help="take this fraction of the benchmark's batch")
    o = parser.parse_args()
    allocator = keep_freed_memory()
    command = f"python benchmarks/step_profile.py --steps {o.steps} --divide {o.divide}"
    print("\n".join(head_lines(surroundings(command, clock="cpu", repeats=o.steps, allocator=allocator))))
    table = [("share of self time", *("resnet20", "resnet18", "gpt"))]
    columns = []
    for name in table[0][1:]:
        torch.manual_seed(0)
        subject = SUBJECTS[name]
        model, inputs = subject.model(), subject.inputs(max(1, subject.batch // o.divide))
        variant = Variant(name=name, recipe="int8_dynamic")
        run = _training_step(variant.prepare(model), inputs, variant)
        for _ in range(2):
            run()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            for _ in range(o.steps):
                run()
        shares = dict.fromkeys((*KINDS, "everything else"), 0.0)
        for event in profiled.key_averages():
            kind = next((k for k, words in KINDS.items() if any(w in event.key for w in words)), "everything else")
            shares[kind] += event.self_cpu_time_total
        total = sum(shares.values())
        columns.append({kind: f"{100 * value / total:.1f} %" for kind, value in shares.items()})
    for kind in columns[0]:
        table.append((kind, *(column[kind] for column in columns)))
    print(aligned(table))


if __name__ == "__main__":
    main()
