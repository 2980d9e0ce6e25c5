"""What ``fqt_accuracy.py`` and ``fqt_gpt.py`` share: run ``gradbits train --compare``, write its table and records."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from results_page import table

from gradbits.kernels import machine

LOGS = Path(__file__).parent / "logs"


def compare(command: str, seeds: str, out: Path | None) -> list[dict[str, Any]]:
    """Run ``gradbits train`` for each seed in a folder of its own below ``out`` and return all records.

    A run that is there already goes on where it was, so several processes may take different seeds of one ``out``.
    """
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in seeds.split(","):
            folder = (out or Path(temporary)) / f"seed{seed}"
            arguments = ["--resume"] if folder.exists() else [*shlex.split(command), "--seeds", seed]
            # its progress goes to the terminal
            done = subprocess.run(
                [sys.executable, "-m", "gradbits", "train", *arguments, "--out", str(folder)], check=False
            )
            if done.returncode:
                sys.exit(done.returncode)
            records += json.loads((folder / "results.json").read_text())
    return records


def write(name: str, command: str, records: list[dict[str, Any]], keep: bool) -> None:
    """Print the table; where ``keep``, write it and the records to ``logs``."""
    for record in records:
        record["command"] = f"gradbits train {command}"
    sets = ", ".join(machine.instruction_sets())
    where = f"torch {torch.__version__}, python {platform.python_version()}, {torch.get_num_threads()} threads ({sets})"
    text = "\n".join([f"gradbits train {command}", f"{where}, shared machine", "", table(records, "en"), ""])
    print(text)
    if keep:
        (LOGS / f"{name}.json").write_text(json.dumps(records, indent=1) + "\n")
        (LOGS / f"{name}.txt").write_text(text)


if __name__ == "__main__":
    sys.exit("run fqt_accuracy.py or fqt_gpt.py")
