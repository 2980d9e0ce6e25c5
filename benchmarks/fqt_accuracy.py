"""Accuracy of fully quantized training on Fashion-MNIST: where each gradient quantizer breaks down.

A thin wrapper around ``gradbits train --compare``: ``small_cnn``, 5 epochs, 3 seeds, StatQuant at 8, 6, 5 and 4 bits in
``grad_input``. Writes ``benchmarks/logs/fqt_accuracy.txt`` and ``.json``; with ``--out`` an interrupted run goes on:

    python benchmarks/fqt_accuracy.py [--limit N] [--epochs N] [--seeds 0,1,2] [--bits 8,6,5,4] [--out FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fqt_run import compare, write

METHODS = ("statquant_ptq", "statquant_psq", "statquant_bhq")


def main() -> None:
    """Run the comparison and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, help="first N training images: a try-out, which writes no log")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--bits", default="8,6,5,4")
    parser.add_argument("--out", type=Path, help="keep the run's folder here, and go on with it if it is there")
    options = parser.parse_args()
    quantized = [f"{m}:grad_input.gradient.bits={b}" for b in options.bits.split(",") for m in METHODS]
    networks = ",".join(["fp32", "unified_int8", "adaptive_int8", *quantized])
    command = f"--data fashion-mnist --model small_cnn --compare {networks}"
    command += f" --epochs {options.epochs}"
    command += f" --limit {options.limit}" if options.limit else ""
    records = compare(command, options.seeds, options.out)
    write("fqt_accuracy", f"{command} --seeds {options.seeds}", records, keep=not options.limit)


if __name__ == "__main__":
    main()
