"""Benchmarks as text: one table a work, and a summary against what is expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Line = tuple[str, ...]


def aligned(lines: Sequence[Line]) -> str:
    """Return lines as a table: the first column to the left, the others to the right.

    >>> print(aligned([("name", "ms"), ("a", "1.5")]))
    name   ms
    a     1.5
    """
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = []
    for line in lines:
        first, *others = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        rows.append("  ".join([first, *others]).rstrip())
    return "\n".join(rows)


def work_table(outcome: Mapping[str, Any]) -> str:
    """Return the table of one work from what ``contest.as_dict`` returned."""
    labels = list(dict.fromkeys(label for row in outcome["contestants"] for label in row["faster_than"]))
    moves = outcome["unit"] == "bytes"
    head = ("", "ms", "GB/s" if moves else "Gop/s", "of limit", *(f"{label} / this" for label in labels), "error")
    lines, notes = [head], []
    for row in outcome["contestants"]:
        if row["note"]:
            notes.append(f"  {row['name']}: {row['note']}")
        if row["median_ms"] is None:
            continue
        lines.append(
            (
                row["name"],
                f"{row['median_ms']:.2f}",
                f"{row['per_second'] / 1e9:.1f}" if moves else f"{row['per_second'] / 1e9:.0f}",
                "" if row["of_peak"] is None else f"{100 * row['of_peak']:.0f} %",
                *(f"{row['faster_than'][label]:.2f}" if label in row["faster_than"] else "" for label in labels),
                "" if row["error"] is None else f"{row['error']:.2g}",
            )
        )
    if not any(line[-1] for line in lines[1:]):
        lines = [line[:-1] for line in lines]
    body = aligned(lines) if len(lines) > 1 else "nobody could take part"
    left_out = ["left out or doubtful:", *notes] if notes else []
    return "\n".join([outcome["work"], body, *left_out])


def summary(outcomes: Sequence[Mapping[str, Any]]) -> str:
    """Return one line a work: the best of ours, its ratios, and where they stand to what is expected."""
    labels = next((" / ".join(o["best"]["faster_than"]) for o in outcomes if o["best"] is not None), "")
    lines: list[Line] = [("work", "best of gradbits", f"{labels} / this", "must", "aim", "")]
    for outcome in outcomes:
        best = outcome["best"]
        if best is None:
            continue
        found = best["faster_than"]
        cells = [_pair(found), _pair(outcome["must"]), _pair(outcome["aim"])]
        lines.append((outcome["work"], best["name"], *cells, _verdict(found, outcome["must"], outcome["aim"])))
    if all(line[3] == line[4] == "" for line in lines[1:]):
        lines = [line[:3] for line in lines]
    return aligned(lines)


def _pair(values: Mapping[str, float] | None) -> str:
    return "" if not values else " / ".join(f"{value:.2f}" for value in values.values())


def _verdict(found: Mapping[str, float], must: Mapping[str, float] | None, aim: Mapping[str, float] | None) -> str:
    if must is None or not set(must) <= set(found):
        return ""
    if aim is not None and all(found[label] >= value for label, value in aim.items()):
        return "aim reached"
    return "reached" if all(found[label] >= value for label, value in must.items()) else "missed"
