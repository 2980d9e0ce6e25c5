"""Accuracy of quantization-aware training on Fashion-MNIST: ``qat_int8`` at 8 and 4 bits next to fp32.

A thin wrapper around ``gradbits train --compare``: ``small_cnn``, 5 epochs, 3 seeds; weights and activations have the
same number of bits. The accuracies of ``qat_int8`` are those of integer inference. Writes
``benchmarks/logs/qat_accuracy.txt`` and ``.json``; with ``--out`` an interrupted run goes on:

    python benchmarks/qat_accuracy.py [--limit N] [--epochs N] [--seeds 0,1,2] [--bits 8/8,4/4] [--out FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fqt_run import compare, write


def main() -> None:
    """Run the comparison and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, help="first N training images: a try-out, which writes no log")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--bits", default="8/8,4/4", help="weights/activations")
    parser.add_argument("--out", type=Path, help="keep the run's folder here, and go on with it if it is there")
    options = parser.parse_args()
    pairs = [pair.split("/") for pair in options.bits.split(",")]
    networks = ",".join(["fp32", *(f"qat_int8:weight.bits={w}:input.bits={a}" for w, a in pairs)])
    command = f"--data fashion-mnist --model small_cnn --compare {networks}"
    command += f" --epochs {options.epochs}"
    command += f" --limit {options.limit}" if options.limit else ""
    records = compare(command, options.seeds, options.out)
    write("qat_accuracy", f"{command} --seeds {options.seeds}", records, keep=not options.limit)


if __name__ == "__main__":
    main()
