"""Accuracy of EWGS beside the plain straight-through estimator on Fashion-MNIST, from 1 bit.

A thin wrapper around ``gradbits train``: for each of 3 seeds, fp32 trains ``small_cnn`` for 5 epochs; from its weights
``ewgs`` and the straight-through estimator (``ewgs`` with delta 0) train 5 epochs more at 1/1, 2/2 and 4/4 bits of
weights and activations, and fp32 too, for comparison. Writes ``benchmarks/logs/ewgs_accuracy.txt`` and ``.json``; with
``--out`` an interrupted run goes on:

    python benchmarks/ewgs_accuracy.py [--limit N] [--epochs N] [--seeds 0,1,2] [--bits 1,2,4] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from fqt_run import compare, write

SET = "--data fashion-mnist --model small_cnn"


def one_seed(options: argparse.Namespace, seed: str, folder: Path) -> list[dict[str, Any]]:
    """Train fp32, and from its weights the others; return the records of the second training."""
    common = f"{SET} --epochs {options.epochs}" + (f" --limit {options.limit}" if options.limit else "")
    compare(f"{common} --recipe fp32", seed, folder / "float")
    start = folder / "float" / f"seed{seed}" / "models" / f"fp32-seed{seed}.safetensors"
    return compare(f"{common} --init {start} --compare {networks(options.bits)}", seed, folder / "few-bits")


def networks(bits: str) -> str:
    """Return what is compared, as ``--compare`` takes it."""
    found = ["fp32"]
    for b in bits.split(","):
        found += [f"ewgs:weight.bits={b}:input.bits={b}", f"ewgs:weight.bits={b}:input.bits={b}:hessian=null"]
    return ",".join(found)


def main() -> None:
    """Run the comparison and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, help="first N training images: a try-out, which writes no log")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--bits", default="1,2,4")
    parser.add_argument("--out", type=Path, help="keep the runs' folders here, and go on with them if they are there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        records: list[dict[str, Any]] = []
        for seed in options.seeds.split(","):
            records += one_seed(options, seed, folder)
    for record in records:
        record["init"] = f"fp32-seed{record['seed']}.safetensors, trained for as many epochs"
    command = f"{SET} --epochs {options.epochs} --init MODEL --compare {networks(options.bits)}"
    command += f" --seeds {options.seeds}" + (f" --limit {options.limit}" if options.limit else "")
    write("ewgs_accuracy", command, records, keep=not options.limit)


if __name__ == "__main__":
    main()
