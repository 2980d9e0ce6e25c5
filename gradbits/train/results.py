"""What a run leaves behind: a record per trained network, and the table that compares them."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table

import gradbits
from gradbits.core.errors import CorruptDataError
from gradbits.core.files import write_atomically
from gradbits.train.entry import Entry
from gradbits.train.loop import Position
from gradbits.train.measure import Cost
from gradbits.train.options import TrainOptions
from gradbits.train.tasks import Task

Record = dict[str, Any]
METRICS = ("test_accuracy", "bits_per_byte")


def make_record(
    *,
    entry: Entry,
    options: TrainOptions,
    task: Task,
    seed: int,
    at: Position,
    cost: Cost | None,
    command: str,
    model_file: str,
    sparsity: float,
    bits: Mapping[int, float] | None = None,
    wire: Record | None = None,
) -> Record:
    """Return the record of one trained network: JSON values, ``None`` for a number that is not finite.

    ``test_accuracy`` is a share from 0 to 1; ``train_loss`` is the mean cross-entropy in nats over the last epoch (or
    over all steps, if there were fewer). ``model_file`` is relative to the folder of the run; ``sparsity`` is the part
    of exact zeros among the weights of two axes or more. ``bits_results`` holds the test metric after post-training
    quantization by number of bits, or None.
    ``wire`` says what several ranks sent each other. ``cost`` is None where a diverged network could not be measured.
    """
    record = {
        "network": entry.label,
        "recipe": entry.recipe,
        "overrides": dict(entry.overrides),
        "data": options.data,
        "model": options.model,
        "model_options": options.model_options(),
        "seed": seed,
        "epochs": round(at.step / task.steps_per_epoch, 4),
        "steps": at.step,
        "batch_size": options.batch_size,
        "optimizer": options.optimizer,
        "lr": options.lr,
        "weight_decay": options.weight_decay,
        "schedule": options.schedule,
        "limit": options.limit,
        "init": options.init,
        "train_loss": at.final_loss / at.final_steps,
        task.metric: at.metric,
        "step_ms_median": None if cost is None else cost.step_ms,
        "saved_bytes": None if cost is None else cost.saved_bytes,
        "gradient_bits": None if cost is None else cost.gradient_bits,
        "seconds": at.seconds,
        "device": options.device,
        "threads": options.threads,
        "compute": options.compute,
        "pack_activations": options.pack_activations,
        "gradient_l1": options.gradient_l1,
        "gradient_l1_activations": options.gradient_l1_activations,
        "gradient_l1_start": options.gradient_l1_start,
        "bits_results": None if bits is None else {str(b): _or_none(v) for b, v in bits.items()},
        "prune": options.prune,
        "share": options.share,
        "sparsity": sparsity,
        **(wire or {}),
        "model_file": model_file,
        "versions": versions(),
        "command": command,
    }
    return {k: _or_none(v) for k, v in record.items()}


def _or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """Return the versions that the numbers may depend on."""
    return {
        "gradbits": gradbits.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def save_results(path: Path, records: Sequence[Record]) -> None:
    """Write the records as a JSON list."""
    text = json.dumps(list(records), indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def load_results(path: Path) -> list[Record]:
    """Return the records of a results file.

    Raises:
        CorruptDataError: it is not a JSON list of objects.
    """
    try:
        records = json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptDataError(f"{path}: is not JSON: {error}") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise CorruptDataError(f"{path}: is not a list of records")
    return records


def results_table(records: Sequence[Record]) -> Table:
    """Return the comparison, a row per network: the mean over its seeds, next to fp32 where that was trained too.

    The spread behind ± is the standard deviation over the seeds (with one less than their number in the divisor).
    """
    metric = next(name for name in METRICS if name in records[0])
    accuracy = metric == "test_accuracy"
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(str(record["network"]), []).append(record)
    reference = groups.get("fp32")
    first = records[0]
    seeds = len(next(iter(groups.values())))
    title = f"{first['data']}, {first['model']}, {first['steps']} steps, {seeds} seed{'s' if seeds > 1 else ''}"
    wired = first.get("ranks", 1) > 1
    if wired:
        title += f", {first['ranks']} ranks, wire {first['wire']}"
    # no lines between the columns and short headings: it has to fit into 80 characters
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("network", overflow="fold")
    quality_heading = "test accuracy" if accuracy else "bits per byte"
    for heading in (quality_heading, "vs fp32", "step", "vs fp32", "saved for\nbackward", "bits per\ngradient"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("sent per\nstep", "ratio") if wired else ():
        table.add_column(heading, justify="right", no_wrap=True)
    for label, group in groups.items():
        value, spread = _mean(group, metric), _spread(group, metric)
        scale, digits = (100, 2) if accuracy else (1, 3)
        diverged = _diverged(group, metric)
        quality = f"{scale * value:.{digits}f}" + (f" ± {scale * spread:.{digits}f}" if spread is not None else "")
        quality += " %" if accuracy else ""
        step, width = _mean(group, "step_ms_median"), _mean(group, "gradient_bits")
        relative = step / _mean(reference, "step_ms_median") if reference else math.nan
        table.add_row(
            label,
            "diverged" if diverged else quality,
            _difference(value, _mean(reference, metric), accuracy) if reference and not diverged else "",
            "" if math.isnan(step) else f"{step:.1f} ms",
            "" if math.isnan(relative) else f"{relative:.2f}x",
            _bytes(_mean(group, "saved_bytes")),
            "" if math.isnan(width) else f"{width:.4g}",
            *((_bytes(_mean(group, "wire_bytes_per_step")), f"{_mean(group, 'wire_ratio'):.1f}x") if wired else ()),
        )
    return table


def bits_table(records: Sequence[Record]) -> Table | None:
    """Return the test results after post-training quantization, a row per network; None where there are none."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record.get("bits_results") is not None:
            groups.setdefault(str(record["network"]), []).append(record)
    if not groups:
        return None
    metric = next(name for name in METRICS if name in records[0])
    accuracy = metric == "test_accuracy"
    what = "test accuracy" if accuracy else "bits per byte"
    table = Table(title=f"{what} quantized after training", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("network", overflow="fold")
    widths = list(next(iter(groups.values()))[0]["bits_results"])
    for heading in ("float", *(f"{width} bits" for width in widths)):
        table.add_column(heading, justify="right", no_wrap=True)
    for label, group in groups.items():
        flat = [{metric: record[metric], **record["bits_results"]} for record in group]
        values = [math.nan if _diverged(group, metric) else _mean(flat, key) for key in (metric, *widths)]
        shown = (f"{100 * value:.2f} %" if accuracy else f"{value:.3f}" for value in values)
        table.add_row(label, *("diverged" if math.isnan(v) else text for v, text in zip(values, shown, strict=True)))
    return table


def _diverged(group: Sequence[Record], metric: str) -> bool:
    # a loss that is no longer a number is a result too, and the test accuracy alone would hide it
    return any(record[metric] is None or record["train_loss"] is None for record in group)


def _mean(group: Sequence[Record], key: str) -> float:
    return statistics.fmean(math.nan if record[key] is None else record[key] for record in group)


def _spread(group: Sequence[Record], key: str) -> float | None:
    values = [record[key] for record in group if record[key] is not None]
    return statistics.stdev(values) if len(values) > 1 else None


def _difference(value: float, reference: float, accuracy: bool) -> str:
    return f"{100 * (value - reference):+.2f} pt" if accuracy else f"{100 * (value / reference - 1):+.2f} %"


def _bytes(count: float) -> str:
    if math.isnan(count):
        return ""
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.2f} kB"
