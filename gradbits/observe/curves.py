"""Training curves as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gradbits.core.errors import MissingDependencyError
from gradbits.core.files import write_atomically


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of one panel.

    Args:
        label: what it belongs to; lines with the same label get the same colour and one entry in the legend.
        steps: abscissae.
        values: ordinates; a gap where a value is not finite.
    """

    label: str
    steps: Sequence[int]
    values: Sequence[float]


def save_curves(path: Path, panels: Sequence[tuple[str, Sequence[Curve]]], title: str = "") -> None:
    """Draw panels side by side and write them as a PNG file.

    Args:
        path: the file to make.
        panels: (name of the ordinate, curves) from left to right; the abscissa is the training step.
        title: above the panels.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        GradbitsError: the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("curves need matplotlib: pip install 'gradbits[plot]'") from error
    # a Figure of its own, not pyplot: pyplot keeps global state and may look for a display
    figure = Figure(figsize=(5.5 * max(1, len(panels)), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    labels = list(dict.fromkeys(curve.label for _, curves in panels for curve in curves))
    for index, (name, curves) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), index)
        drawn: set[str] = set()
        for curve in curves:
            axes.plot(
                list(curve.steps),
                [value if math.isfinite(value) else math.nan for value in curve.values],
                color=f"C{labels.index(curve.label) % 10}",
                label=None if curve.label in drawn else curve.label,
                linewidth=1.2,
                marker="." if len(curve.steps) < 30 else "",
            )
            drawn.add(curve.label)
        axes.set_xlabel("step")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        if drawn:
            axes.legend(fontsize="small")
    if title:
        figure.suptitle(title)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
