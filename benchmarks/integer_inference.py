"""Integer inference: the same integers from training to onnxruntime, file sizes and latencies against fp32.

Trains each model with ``qat_int8`` on Fashion-MNIST (``gradbits train``), exports it (``gradbits export --check``) and
compares evaluation, ``convert_`` and both ONNX forms over the whole test set. Writes
``benchmarks/logs/integer_inference.txt`` and ``.json``:

    python benchmarks/integer_inference.py [--models small_cnn,resnet20,mobilenet,mlp] [--steps N] [--data NAME]

With ``--out`` the trained models are kept there and used again, so that latencies can be measured when all is quiet.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from timing import header

from gradbits.train.export_file import BATCH, Exported, export_file

LOGS = Path(__file__).parent / "logs"


def trained(model: str, data: str, steps: int, folder: Path) -> Path:
    """Train a model in ``folder``, or go on with it, and return its file."""
    command = f"train --data {data} --model {model} --recipe qat_int8 --steps {steps} --out {folder}"
    if folder.exists():
        command = f"train --resume --out {folder}"
    if not (folder / "results.json").exists():
        done = subprocess.run([sys.executable, "-m", "gradbits", *command.split()], check=False)
        if done.returncode:
            sys.exit(done.returncode)
    (path,) = (folder / "models").glob("*.safetensors")
    return path


def table(model: str, done: Exported) -> str:
    """Return the results of one model as text."""
    lines = [
        f"{model}: {done.samples:,} test samples",
        f"  {'form':<10}{'bytes':>12}{'accuracy':>11}{'integers differ':>17}{'answers differ':>16}{'1 sample':>12}"
        f"{f'{BATCH} samples':>13}{'fp32/this':>11}",
    ]
    base = done.checked[0].ms_batch
    for row in done.checked:
        differ = "" if row.differing is None else f"{row.differing:,}"
        answers = "" if row.differing is None else f"{row.answers:,}"
        one, many = ("" if ms is None else f"{ms:.3f} ms" for ms in (row.ms_one, row.ms_batch))
        ratio = "" if row.ms_batch is None or base is None else f"{base / row.ms_batch:.2f}"
        accuracy = "" if row.accuracy is None else f"{100 * row.accuracy:.2f} %"
        lines.append(
            f"  {row.name:<10}{row.nbytes:>12,}{accuracy:>11}{differ:>17}{answers:>16}{one:>12}{many:>13}{ratio:>11}"
        )
    return "\n".join(lines)


def main() -> None:
    """Train, export, check, and write the log."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="small_cnn,resnet20,mobilenet,mlp")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--steps", type=int, default=469)
    parser.add_argument("--threads", type=int, default=1, help="of onnxruntime")
    parser.add_argument("--out", type=Path, help="keep the trained models here")
    parser.add_argument("--try-out", action="store_true", help="write no log")
    options = parser.parse_args()
    import onnxruntime

    command = f"python benchmarks/integer_inference.py --models {options.models} --data {options.data}"
    command += f" --steps {options.steps} --threads {options.threads}"
    note = "integers of the result and answers that differ from the evaluation of the trained model; wall time, medians"
    parts = [header(command), f"onnxruntime {onnxruntime.__version__}, {options.threads} thread(s); {note}\n"]
    records = []
    for model in options.models.split(","):
        with tempfile.TemporaryDirectory() as temporary:
            path = trained(model, options.data, options.steps, (options.out or Path(temporary)) / model)
            done = export_file(path, check=True, threads=options.threads)
        parts.append(table(model, done) + "\n")
        print(parts[-1], flush=True)
        records.append({"model": model, "samples": done.samples, "forms": [asdict(row) for row in done.checked]})
    if not options.try_out:
        (LOGS / "integer_inference.txt").write_text("\n".join(parts))
        (LOGS / "integer_inference.json").write_text(json.dumps(records, indent=1) + "\n")
    exact = all(form["differing"] in (None, 0) for r in records for form in r["forms"] if form["name"] != "qdq")
    print("integer and convert_: the same integers" if exact else "integers differ", torch.__version__)


if __name__ == "__main__":
    main()
