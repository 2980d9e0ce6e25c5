"""Accuracy, step time, saved bytes and gradient bits of the first recipes next to fp32.

Runs the commands below one after the other and writes each with its table to ``benchmarks/logs/foundation_NAME.txt``,
its records to ``foundation_NAME.json``; ``benchmarks/results_page.py`` then puts the tables into the documents:

    python benchmarks/foundation.py [NAME ...]
"""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from results_page import table

from gradbits.kernels import machine

FOUR = "--compare fp32,bf16,int8_dynamic,unified_int8"
RUNS = {
    "digits": f"--data digits --model small_cnn --model-set width=32 {FOUR} --seeds 0,1,2",
    "fashion_small_cnn": "--data fashion-mnist --model small_cnn --compare fp32,unified_int8 --epochs 3 --seeds 0,1,2",
    "gpt": f"--data pydoc --model gpt {FOUR} --steps 300",
    "fashion_resnet20": f"--data fashion-mnist --model resnet20 {FOUR} --epochs 1",
}
LOGS = Path(__file__).parent / "logs"


def main() -> None:
    """Run the named benchmarks, or all."""
    names = sys.argv[1:] or list(RUNS)
    unknown = [name for name in names if name not in RUNS]
    if unknown:
        sys.exit(f"no benchmark {unknown[0]!r}; there are {', '.join(RUNS)}")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            command = ["train", *shlex.split(RUNS[name]), "--out", str(Path(folder) / "out")]
            done = subprocess.run(
                [sys.executable, "-m", "gradbits", *command],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                sys.exit(done.stderr)
            records = json.loads((Path(folder) / "out" / "results.json").read_text())
        for record in records:  # the folder was a temporary one
            record["command"] = f"gradbits train {RUNS[name]}"
        (LOGS / f"foundation_{name}.json").write_text(json.dumps(records, indent=1) + "\n")
        text = "\n".join([f"gradbits train {RUNS[name]}", _where(), "", table(records, "en"), ""])
        (LOGS / f"foundation_{name}.txt").write_text(text)
        print(text)


def _where() -> str:
    sets = ", ".join(machine.instruction_sets())
    threads = torch.get_num_threads()
    return f"torch {torch.__version__}, python {platform.python_version()}, {threads} threads ({sets}), shared machine"


if __name__ == "__main__":
    main()
