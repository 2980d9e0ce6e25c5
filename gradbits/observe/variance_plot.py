"""The variance of quantized gradients as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gradbits.core.errors import MissingDependencyError
from gradbits.core.files import write_atomically
from gradbits.observe.replay import PRODUCTS
from gradbits.observe.variance import VarianceReport


def save_variance(path: Path, reports: Mapping[str, VarianceReport], title: str = "") -> None:
    """Draw the relative variance of every layer as a PNG file: a line for each report, a panel for each product.

    Args:
        path: the file to make.
        reports: label -> report, for example by recipe and bits.
        title: above the panels.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        GradbitsError: the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("plots need matplotlib: pip install 'gradbits[plot]'") from error
    # a Figure of its own, not pyplot: pyplot keeps global state and may look for a display
    figure = Figure(figsize=(12.0, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(row.layer for report in reports.values() for row in report.rows))
    for index, product in enumerate(PRODUCTS, start=1):
        axes = figure.add_subplot(1, len(PRODUCTS), index)
        for number, (label, report) in enumerate(reports.items()):
            rows = [r for r in report.rows if r.product == product and r.variance > 0 and r.size > 0]
            where, color = [names.index(r.layer) for r in rows], f"C{number % 10}"
            axes.plot(where, [r.relative for r in rows], marker="o", color=color, label=label)
            axes.plot(where, [r.bound / r.size for r in rows], linestyle=":", color=color)
        axes.set_yscale("log")
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize="small")
        axes.set_ylabel(f"variance of {product} / |{product}|²")
        axes.grid(alpha=0.3)
        if reports:
            axes.legend(fontsize="small", title="dotted: closed-form bound", title_fontsize="small")
    if title:
        figure.suptitle(title)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
