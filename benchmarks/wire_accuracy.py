"""Accuracy and traffic of ways to average gradients: Fashion-MNIST, resnet20, several processes of this machine.

Every run is ``gradbits train`` under torchrun with gloo. ``python benchmarks/wire_accuracy.py`` runs everything;
``--only alq3,fp32 --ranks 2 --seeds 0,1 --out FOLDER`` a part of it. With --out, every finished run is kept and an
interrupted one goes on. The table and the records go to ``benchmarks/logs`` where the runs are the default ones, or
with --keep; with --add the records that are there stay, but for those made anew, so that a long table can be made in
parts. Add --limit or --steps for a try-out.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from gradbits.kernels import machine

LOGS = Path(__file__).parent / "logs"
METHODS = {
    "fp32": "--wire none",
    "fp16": "--wire fp16",
    "powersgd": "--wire powersgd",
    "qsgd4": "--wire qsgd --wire-bits 4",
    "alq3": "--wire alq --wire-bits 3",
    "alq3_huffman": "--wire alq --wire-bits 3 --entropy huffman",
    "terngrad": "--wire terngrad",
    "onebit_feedback": "--wire onebit --wire-feedback",
    "quantized_adam": "--optimizer quantized_adam --lr 0.001",
    "adam": "--wire none --optimizer adam --lr 0.001",
}


def run(name: str, ranks: int, arguments: argparse.Namespace, base: Path) -> list[dict[str, Any]]:
    """Train one way of averaging on ``ranks`` processes, or go on with it, and return its records."""
    folder = base / f"{name}-{ranks}"
    if not (folder / "results.json").is_file():
        command = f"--data fashion-mnist --model resnet20 --recipe fp32 --seeds {arguments.seeds} {METHODS[name]}"
        for option in ("epochs", "steps", "limit", "data_dir"):
            if (value := getattr(arguments, option)) is not None:
                command += f" --{option.replace('_', '-')} {value}"
        begun = (folder / "options.json").is_file()
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "gradbits"]
        rest = ["--resume"] if begun else shlex.split(command)
        print(f"{name}, {ranks} ranks: gradbits train {shlex.join(rest)}", flush=True)
        done = subprocess.run([sys.executable, *launcher, "train", *rest, "--out", str(folder)], check=False)
        if done.returncode:
            sys.exit(done.returncode)
    records: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return [{"method": name, **record, "command": record["command"].partition(" --out ")[0]} for record in records]


def table(records: list[dict[str, Any]]) -> str:
    """Return a row for each method and number of ranks: means over the seeds, the spread behind ±."""
    head = f"{'ranks':>5}  {'method':<16} {'seeds':>5} {'test accuracy':>16}  {'bytes/step':>11}  {'ratio':>6}"
    head += f"  {'step':>9}"
    lines = [head, "-" * len(head)]
    keys = dict.fromkeys((record["ranks"], record["method"]) for record in records)
    for ranks, method in keys:
        group = [r for r in records if (r["ranks"], r["method"]) == (ranks, method)]
        values = [100 * r["test_accuracy"] for r in group if r["test_accuracy"] is not None]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        accuracy = f"{statistics.fmean(values):.2f}{spread} %" if values else "diverged"
        sent, ratio, step = (
            statistics.fmean(r[key] for r in group) for key in ("wire_bytes_per_step", "wire_ratio", "step_ms_median")
        )
        row = f"{ranks:>5}  {method:<16} {len(group):>5} {accuracy:>16}  {sent:>11.0f}  {ratio:>5.1f}x  {step:>6.0f} ms"
        lines.append(row)
    return "\n".join(lines)


def added(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return ``records`` and those of the log that they do not replace, in the order of the methods."""
    path = LOGS / "wire_accuracy.json"
    found = {}
    for record in [*(json.loads(path.read_text()) if path.exists() else []), *records]:
        found[record["ranks"], list(METHODS).index(record["method"]), record["seed"]] = record
    return [found[key] for key in sorted(found)]


def write(records: list[dict[str, Any]], command: str, name: str | None) -> None:
    """Print the table; where there is a ``name``, write it and the records to ``logs``."""
    where = f"torch {torch.__version__}, python {platform.python_version()}, gloo on one machine, shared"
    sets = ", ".join(machine.instruction_sets())
    text = "\n".join([command, f"{where} ({sets})", "", table(records), ""])
    print(text)
    if name is not None:
        LOGS.mkdir(exist_ok=True)
        (LOGS / f"{name}.txt").write_text(text)
        (LOGS / f"{name}.json").write_text(json.dumps(records, indent=1) + "\n")


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(METHODS), help=f"of {','.join(METHODS)}")
    parser.add_argument("--ranks", default="2,4", help="numbers of processes")
    parser.add_argument("--seeds", default="0", help="as 0,1,2")
    parser.add_argument("--epochs", type=int, help="default: 1, unless --steps")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--data-dir", dest="data_dir")
    parser.add_argument("--out", type=Path, help="folder that keeps the runs")
    parser.add_argument("--keep", action="store_true", help="write the logs whatever is run")
    parser.add_argument("--add", action="store_true", help="write the logs, and keep what they hold")
    arguments = parser.parse_args()
    if arguments.epochs is None and arguments.steps is None:
        arguments.epochs = 1
    names = [name.strip() for name in arguments.only.split(",")]
    if unknown := [name for name in names if name not in METHODS]:
        parser.error(f"--only: {unknown[0]!r} is none of {', '.join(METHODS)}")
    with tempfile.TemporaryDirectory() as temporary:
        base = arguments.out or Path(temporary)
        base.mkdir(parents=True, exist_ok=True)
        records = []
        for ranks in (int(text) for text in arguments.ranks.split(",")):
            for name in names:
                records += run(name, ranks, arguments, base)
    whole = names == list(METHODS) and arguments.limit is None and arguments.steps is None
    given = " ".join(a for i, a in enumerate(sys.argv[1:], 1) if a != "--out" and sys.argv[i - 1] != "--out")
    command = f"python benchmarks/wire_accuracy.py {given}".rstrip()
    if arguments.add:
        records, command = added(records), "python benchmarks/wire_accuracy.py --add, in parts"
    write(records, command, "wire_accuracy" if whole or arguments.keep or arguments.add else None)


if __name__ == "__main__":
    main()
