"""One run of a benchmark: settles the process, measures the machine, holds every contest, leaves a record."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gradbits.bench.allocator import keep_freed_memory, start_afresh
from gradbits.bench.chart import check_chart, save_chart
from gradbits.bench.contest import Work, as_dict, compete
from gradbits.bench.record import head_lines, save_record, surroundings
from gradbits.bench.roofline import roofline
from gradbits.bench.table import summary, work_table
from gradbits.bench.timing import CLOCKS
from gradbits.core.checks import check_choice, check_integer, check_output


def _silent(text: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a benchmark runs.

    Args:
        command: the command line that repeats it.
        threads: CPU threads; None leaves them to PyTorch.
        repeats: rounds.
        clock: ``"wall"`` or ``"cpu"``.
        json: file for the record, or None.
        chart: file for the picture, in the format that its ending names, or None.
        show: called with each finished piece of text.
        tell: called with what is being done.
    """

    command: str
    threads: int | None = None
    repeats: int = 7
    clock: str = "wall"
    json: Path | None = None
    chart: Path | None = None
    show: Callable[[str], None] = print
    tell: Callable[[str], None] = _silent

    def __post_init__(self) -> None:
        check_choice(self.clock, "clock", tuple(CLOCKS))
        check_integer(self.repeats, "repeats", 1)
        if self.threads is not None:
            check_integer(self.threads, "threads", 1)
        check_output(self.json, "json")
        check_chart(check_output(self.chart, "chart"))

    def settle(self) -> dict[str, Any]:
        """Settle this process for a benchmark; return where it runs."""
        allocator = keep_freed_memory()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return surroundings(self.command, clock=self.clock, repeats=self.repeats, allocator=allocator)


def hold(works: Callable[[], Iterable[Work]], settings: Settings) -> list[dict[str, Any]]:
    """Hold every contest, show its table as soon as it is there, and leave the record that is asked for.

    Args:
        works: called when the process is settled; best makes each work as it is asked for, so that what one needed is
            gone before the next.
        settings: how.

    Returns:
        The outcomes, see ``contest.as_dict``.
    """

    def outcomes(peaks: dict[str, float]) -> Iterator[dict[str, Any]]:
        for work in works():
            start_afresh()
            yield _outcome(work, settings, peaks)

    return _hold(outcomes, settings)


def hold_apart(makers: Sequence[Callable[[], Work]], settings: Settings) -> list[dict[str, Any]]:
    """Hold every contest in a process of its own: compiled models leave a process slower than they found it.

    Args:
        makers: make a work each; other processes get them and ``settings``, so both can be pickled.
        settings: how.

    Returns:
        The outcomes, see ``contest.as_dict``.
    """

    def outcomes(peaks: dict[str, float]) -> Iterator[dict[str, Any]]:
        for make in makers:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                yield process.submit(_apart, make, settings, peaks).result()

    return _hold(outcomes, settings)


def _apart(make: Callable[[], Work], settings: Settings, peaks: dict[str, float]) -> dict[str, Any]:
    """Hold one contest in this process, which was started for it."""
    settings.settle()
    return _outcome(make(), settings, peaks)


def _outcome(work: Work, settings: Settings, peaks: dict[str, float]) -> dict[str, Any]:
    """Hold one contest."""
    return as_dict(work, compete(work, settings.repeats, settings.clock, settings.tell), peaks)


def _hold(
    contests: Callable[[dict[str, float]], Iterable[dict[str, Any]]], settings: Settings
) -> list[dict[str, Any]]:
    """Show and record what contests, held one after the other against the machine's limits, give."""
    where = settings.settle()
    settings.tell("limits of this machine")
    peaks = roofline(CLOCKS[settings.clock])
    settings.show("\n".join(head_lines(where, peaks)))
    outcomes: list[dict[str, Any]] = []
    for outcome in contests(peaks):
        outcomes.append(outcome)
        settings.show("\n" + work_table(outcome))
    settings.show("\n" + summary(outcomes))
    if settings.json is not None:
        save_record(settings.json, where, limits=peaks, works=outcomes)
    if settings.chart is not None:
        save_chart(settings.chart, outcomes, settings.command)
    return outcomes
