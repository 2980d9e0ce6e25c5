"""Gradient L1 regularization on Fashion-MNIST: accuracy after post-training quantization, by its coefficient.

A thin wrapper around ``gradbits train --eval-bits``: ``small_cnn``, 5 epochs, 3 seeds, plain and with a sweep of the
coefficient over the second half of the steps, each quantized after training to 8, 6, 5 and 4 bits of weights and
activations. Writes ``benchmarks/logs/gradient_l1.txt`` and ``.json``; with ``--out`` an interrupted run goes on:

    python benchmarks/gradient_l1.py [--limit N] [--epochs N] [--seeds 0,1,2] [--sweep 0.001,0.003] [--start 0.5]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from fqt_run import LOGS, compare

from gradbits.kernels import machine

Record = dict[str, Any]


def spread(values: list[float]) -> str:
    """Return mean and standard deviation in percent."""
    deviation = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{deviation} %"


def table(groups: dict[str, list[Record]], bits: str) -> str:
    """Return the Markdown table: a row per coefficient."""
    widths = bits.split(",")
    head = ["coefficient", "float", *(f"{b} bits" for b in widths), "step", "seconds of training"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    base = statistics.median(r["step_ms_median"] for r in next(iter(groups.values())))
    for name, records in groups.items():
        row = [name, spread([r["test_accuracy"] for r in records])]
        row += [spread([r["bits_results"][b] for r in records]) for b in widths]
        step = statistics.median(r["step_ms_median"] for r in records)
        row += [f"{step:.1f} ms ({step / base:.2f}×)", f"{statistics.mean(r['seconds'] for r in records):.0f}"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the sweep and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, help="first N training images: a try-out, which writes no log")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--bits", default="8,6,5,4")
    parser.add_argument("--sweep", default="0.001,0.003")
    parser.add_argument("--start", type=float, default=0.5, help="part of the steps before the term begins")
    parser.add_argument("--out", type=Path, help="keep the runs' folders here, and go on with them if they are there")
    options = parser.parse_args()
    common = f"--data fashion-mnist --model small_cnn --recipe fp32 --epochs {options.epochs}"
    common += f" --eval-bits {options.bits}" + (f" --limit {options.limit}" if options.limit else "")
    groups: dict[str, list[Record]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        groups["none"] = compare(common, options.seeds, folder / "plain")
        for weight in options.sweep.split(","):
            command = f"{common} --gradient-l1 {weight} --gradient-l1-start {options.start}"
            groups[weight] = compare(command, options.seeds, folder / f"l1-{weight}")
    for name, records in groups.items():
        for record in records:
            extra = "" if name == "none" else f" --gradient-l1 {name} --gradient-l1-start {options.start}"
            record["command"] = f"gradbits train {common} --seeds {options.seeds}{extra}"
    sets = ", ".join(machine.instruction_sets())
    where = f"torch {torch.__version__}, python {platform.python_version()}, {torch.get_num_threads()} threads ({sets})"
    extra = f"[--gradient-l1 COEFFICIENT --gradient-l1-start {options.start}]"
    first = f"gradbits train {common} --seeds {options.seeds} {extra}"
    text = "\n".join([first, f"{where}, shared machine", "", table(groups, options.bits), ""])
    print(text)
    if not options.limit:
        (LOGS / "gradient_l1.json").write_text(json.dumps([r for g in groups.values() for r in g], indent=1) + "\n")
        (LOGS / "gradient_l1.txt").write_text(text)


if __name__ == "__main__":
    main()
