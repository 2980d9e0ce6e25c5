"""Benchmarks as a picture: one panel of bars a work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradbits.core.errors import ArgumentError, MissingDependencyError
from gradbits.core.files import write_atomically

COLUMNS = 3  # panels beside one another


def check_chart(path: Path | None) -> Path | None:
    """Return ``path`` if a chart can be drawn in the format that its ending names, or None: asked before the work.

    Raises:
        ArgumentError: matplotlib knows no format of this ending, or needs TeX for it.
        MissingDependencyError: matplotlib is not installed.

    >>> check_chart(None)
    """
    if path is None:
        return None
    legal = sorted({*_canvas().get_supported_filetypes()} - {"pgf"})  # which needs TeX, and says so at the end only
    if _format(path) not in legal:
        raise ArgumentError(f"chart={str(path)!r}: must end in {', '.join(f'.{name}' for name in legal)}")
    return path


def save_chart(path: Path, outcomes: Sequence[Mapping[str, Any]], title: str = "") -> None:
    """Draw the median times of every work as bars and write them to a file.

    Args:
        path: the file to make; its ending names the format, see ``check_chart``.
        outcomes: what ``contest.as_dict`` returned for each work.
        title: above the panels.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        GradbitsError: the file cannot be written.
    """
    figure, panels = _figure(len(outcomes))
    for axes, outcome in zip(panels, outcomes, strict=True):
        rows = [row for row in outcome["contestants"] if row["median_ms"] is not None][::-1]
        ours = outcome["best"]["name"] if outcome["best"] else None
        colors = ["C1" if row["name"] == ours else "C0" for row in rows]
        bars = axes.barh([row["name"] for row in rows], [row["median_ms"] for row in rows], color=colors)
        axes.bar_label(bars, fmt="%.4g", padding=2, fontsize="small")
        axes.set_xlabel("ms")
        axes.set_title(outcome["work"], fontsize="small")
        axes.margins(x=0.15)
    _save(path, figure, title)


def save_memory_chart(path: Path, outcomes: Sequence[Mapping[str, Any]], title: str = "") -> None:
    """Draw the bytes saved by every variant, as they are and packed, and write them to a file.

    Args:
        path: the file to make; its ending names the format, see ``check_chart``.
        outcomes: what ``memory.memory_work`` returned for each model.
        title: above the panels.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        GradbitsError: the file cannot be written.
    """
    figure, panels = _figure(len(outcomes))
    for axes, outcome in zip(panels, outcomes, strict=True):
        rows = outcome["rows"][::-1]
        labels = [row["variant"] + ("" if row["bits"] is None else f", {row['bits']} bits") for row in rows]
        colors = ["C0" if row["bits"] is None else "C1" for row in rows]
        bars = axes.barh(labels, [row["saved"] / 1e6 for row in rows], color=colors)
        axes.bar_label(bars, fmt="%.4g", padding=2, fontsize="small")
        axes.set_xlabel("MB saved for backward")
        axes.set_title(outcome["work"], fontsize="small")
        axes.margins(x=0.15)
    _save(path, figure, title)


def _canvas() -> Any:
    """Return the class that draws without a screen."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise MissingDependencyError("charts need matplotlib: pip install 'gradbits[plot]'") from error
    return FigureCanvasAgg


def _format(path: Path) -> str:
    """Return matplotlib's name of the format that an ending stands for."""
    return path.suffix.removeprefix(".").lower()


def _figure(panels: int) -> tuple[Any, list[Any]]:
    """Return a figure and its panels."""
    canvas = _canvas()
    from matplotlib.figure import Figure

    wide = min(COLUMNS, max(1, panels))
    tall = max(1, -(-panels // wide))
    figure = Figure(figsize=(6.0 * wide, 3.4 * tall), layout="constrained")
    canvas(figure)
    return figure, [figure.add_subplot(tall, wide, index) for index in range(1, panels + 1)]


def _save(path: Path, figure: Any, title: str) -> None:
    if title:
        figure.suptitle(title)
    write_atomically(path, lambda file: figure.savefig(file, format=_format(path), dpi=120))
