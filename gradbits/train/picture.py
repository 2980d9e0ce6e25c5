"""The curves of a run, drawn from its log."""

from __future__ import annotations

from pathlib import Path

from gradbits.observe.curves import Curve, save_curves
from gradbits.train.log import read_log

PANELS = (
    ("training loss, nats", "loss", 1.0),
    ("test accuracy, %", "test_accuracy", 100.0),
    ("test bits per byte", "bits_per_byte", 1.0),
)


def draw_log(log: Path, path: Path, title: str = "") -> None:
    """Draw loss and test results of every network in a log, side by side.

    Args:
        log: a file of JSON lines.
        path: the PNG file to make.
        title: above the panels.

    Raises:
        CorruptDataError: the log is damaged.
        MissingDependencyError: matplotlib is not installed.
    """
    lines = read_log(log)
    panels = []
    for name, key, scale in PANELS:
        series: dict[tuple[str, int], tuple[list[int], list[float]]] = {}
        for line in lines:
            if key in line:
                steps, values = series.setdefault((line["network"], line["seed"]), ([], []))
                steps.append(line["step"])
                values.append(float("nan") if line[key] is None else scale * line[key])
        if series:
            panels.append((name, [Curve(label=k[0], steps=s, values=v) for k, (s, v) in series.items()]))
    save_curves(path, panels, title=title)
